//! A wrong answer at a glance: heads beside ranks.

use super::evidence::{Evidence, Measured};

/// What the marks of a strip mean.
const LEGEND: &str = "a column for each head: . right, x wrong, 0 wrong and all zero";

/// One line for each rank, in it, for each tensor that is wrong, a mark for each
/// head of that rank's tokens; one line more for what belongs to heads and not
/// to tokens. The first line says what the marks mean.
pub(super) fn strip(evidence: &Evidence<'_>) -> Vec<String> {
    let places = evidence.place_of_token();
    let is_of_tokens = |tensor: &&Measured<'_>| tensor.sizes.tokens == places.len();
    let (of_tokens, of_all): (Vec<_>, Vec<_>) = evidence
        .tensors
        .iter()
        .filter(|tensor| tensor.is_wrong())
        .partition(is_of_tokens);
    let marks = |tensor: &Measured<'_>, is_counted: &dyn Fn(usize) -> bool| {
        let mark = |head| mark(tensor, |token, of| of == head && is_counted(token));
        let marks: String = (0..tensor.sizes.heads).map(mark).collect();
        format!("  {} {marks}", tensor.name.name())
    };
    let mut lines = vec![LEGEND.to_owned()];
    if !of_tokens.is_empty() {
        for rank in 0..evidence.ranks() {
            let is_here = |token: usize| places[token].0 == rank;
            let marks = of_tokens.iter().map(|tensor| marks(tensor, &is_here));
            lines.push(format!("rank {rank}{}", marks.collect::<String>()));
        }
    }
    if !of_all.is_empty() {
        let marks = of_all.iter().map(|tensor| marks(tensor, &|_| true));
        lines.push(format!("in all{}", marks.collect::<String>()));
    }
    lines
}

/// The mark of the rows at these tokens and heads.
fn mark(tensor: &Measured<'_>, is_counted: impl Fn(usize, usize) -> bool) -> char {
    let is_counted = |&row: &usize| {
        let (_, token, head) = tensor.sizes.place(row);
        is_counted(token, head)
    };
    let rows = (0..tensor.sizes.rows()).filter(is_counted);
    let places: Vec<usize> = rows.flat_map(|row| tensor.row(row)).collect();
    match places.iter().any(|&i| tensor.is_off(i)) {
        false => '.',
        true if places.iter().all(|&i| tensor.answer[i] == 0.0) => '0',
        true => 'x',
    }
}
