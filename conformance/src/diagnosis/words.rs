//! Numbers of ranks and heads in words.

/// `rank 1`, or `ranks 0, 1 and 2`.
pub(super) fn of_ranks(ranks: impl IntoIterator<Item = usize>) -> String {
    counted("rank", ranks)
}

/// `head 1`, or `heads 0, 1 and 2`.
pub(super) fn of_heads(heads: impl IntoIterator<Item = usize>) -> String {
    counted("head", heads)
}

/// `1 0 2`
pub(super) fn order_of(order: &[usize]) -> String {
    let numbers: Vec<String> = order.iter().map(usize::to_string).collect();
    numbers.join(" ")
}

/// `a`, or `a, b and c`.
pub(super) fn listed(words: &[String]) -> String {
    match words {
        [] => String::new(),
        [one] => one.clone(),
        [more @ .., last] => format!("{} and {last}", more.join(", ")),
    }
}

fn counted(what: &str, numbers: impl IntoIterator<Item = usize>) -> String {
    let words: Vec<String> = numbers.into_iter().map(|n| n.to_string()).collect();
    let s = if words.len() == 1 { "" } else { "s" };
    format!("{what}{s} {}", listed(&words))
}
