//! How a group of ranks came to its end, in a sentence: who waits in which
//! collective for whom, and where a rank was when it ended.
//!
//! All that is known is each rank's last line of progress. `case 3: backward, in
//! all_to_all_single #2` is the second collective that the rank entered in that
//! phase, and `after` one that it left; a launcher may have added `died of
//! SIGSEGV`. Nothing is guessed from it: a rank that is in no collective has not
//! come to the one in which others wait, and ranks in different ones are named
//! with them. Whether collectives belong to the same group of ranks, a line does
//! not say.

use std::fmt::Write;

/// How a group of ranks came to its end.
#[derive(Clone, Debug)]
pub struct Collapse {
    /// Which rank, and what it was doing, in a sentence.
    pub sentence: String,
    /// What ranks and launcher had written last, a line each.
    pub logs: Vec<String>,
    /// Whether it shows what a rank did: not where ranks were not started, nor
    /// where a host or the network between several may be why.
    pub is_of_ranks: bool,
}

/// What is known of a rank.
#[derive(Clone, Debug)]
pub(super) struct LastSeen {
    pub(super) rank: usize,
    /// Its last line of progress.
    pub(super) line: Option<String>,
    pub(super) has_answered: bool,
}

/// `ranks 0, 2 wait in all_to_all_single #2 of forward; rank 1 never came: it is
/// in forward, after all_to_all_single #1`. Nothing if no rank is known to be in
/// a collective of case `number`.
pub(super) fn waiting(number: usize, ranks: &[LastSeen]) -> Option<String> {
    let doing = ranks
        .iter()
        .map(|seen| (seen.rank, Doing::of(seen, number)));
    let (waiting, away): (Vec<_>, Vec<_>) = grouped(doing)
        .into_iter()
        .partition(|(_, doing)| matches!(doing, Doing::Inside { .. }));
    let told = |(ranks, doing): &(Vec<usize>, Doing<'_>)| doing.told_of(ranks);
    let clauses: Vec<_> = waiting.iter().chain(&away).map(told).collect();
    (!waiting.is_empty()).then(|| clauses.join("; "))
}

/// `rank 1 ended (SIGSEGV) in backward, in all_reduce #1`.
pub(super) fn ended(number: usize, ranks: &[LastSeen]) -> String {
    let one = |seen: &LastSeen| {
        let doing = Doing::of(seen, number);
        let mut told = format!("rank {} ended", seen.rank);
        // Writing to a string cannot fail.
        if let Some(cause) = seen.line.as_deref().and_then(|line| split_cause(line).1) {
            let _ = write!(told, " ({cause})");
        }
        let _ = match doing {
            Doing::Inside { phase, collective } => write!(told, " in {phase}, in {collective}"),
            Doing::Outside { phase, left } => write!(told, " {}", outside(phase, left)),
            Doing::Answered => write!(told, " after its answer"),
            Doing::Says(line) => write!(told, " ({line})"),
            Doing::Silent => Ok(()),
        };
        told
    };
    ranks.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// `ranks 0, 2 are on node-a, ranks 1, 3 on node-b`: for each rank its host.
/// Nothing if they are all on one.
pub(super) fn spread<'a>(hosts: impl IntoIterator<Item = (usize, &'a str)>) -> Option<String> {
    let hosts = grouped(hosts);
    let mut told = Vec::new();
    for (i, (ranks, host)) in hosts.iter().enumerate() {
        let verb = match (i, ranks.len()) {
            (0, 1) => " is",
            (0, _) => " are",
            _ => "",
        };
        told.push(format!("{}{verb} on {host}", named(ranks)));
    }
    (hosts.len() > 1).then(|| told.join(", "))
}

/// What a rank does, as far as is known.
#[derive(Clone, Copy, PartialEq)]
enum Doing<'a> {
    /// It has entered this collective and not left it.
    Inside {
        phase: &'a str,
        collective: &'a str,
    },
    /// It is in none, and has perhaps left one.
    Outside {
        phase: &'a str,
        left: Option<&'a str>,
    },
    /// It has answered the case.
    Answered,
    /// It says something that is not about this case.
    Says(&'a str),
    Silent,
}

impl<'a> Doing<'a> {
    fn of(seen: &'a LastSeen, number: usize) -> Doing<'a> {
        if seen.has_answered {
            return Doing::Answered;
        }
        let Some(line) = seen.line.as_deref() else {
            return Doing::Silent;
        };
        let (line, _) = split_cause(line);
        let Some(words) = line.strip_prefix(&format!("case {number}: ")) else {
            return Doing::Says(line);
        };
        if let Some((phase, collective)) = words.rsplit_once(", in ") {
            Doing::Inside { phase, collective }
        } else if let Some((phase, left)) = words.rsplit_once(", after ") {
            let left = Some(left);
            Doing::Outside { phase, left }
        } else {
            let (phase, left) = (words, None);
            Doing::Outside { phase, left }
        }
    }

    /// What ranks do while somebody waits.
    fn told_of(&self, ranks: &[usize]) -> String {
        let (who, is_one) = (named(ranks), ranks.len() == 1);
        let verb = |one, many| if is_one { one } else { many };
        let away = match *self {
            Doing::Inside { phase, collective } => {
                let wait = verb("waits", "wait");
                return format!("{who} {wait} in {collective} of {phase}");
            }
            Doing::Outside { phase, left } => {
                format!("{} {}", verb("it is", "they are"), outside(phase, left))
            }
            Doing::Answered => verb("it has answered", "they have answered").to_owned(),
            Doing::Says(line) => format!("{} `{line}`", verb("it says", "they say")),
            Doing::Silent => verb("it says nothing", "they say nothing").to_owned(),
        };
        format!("{who} never came: {away}")
    }
}

fn outside(phase: &str, left: Option<&str>) -> String {
    match left {
        Some(left) => format!("in {phase}, after {left}"),
        None => format!("in {phase}"),
    }
}

/// The line, and of what the rank died, if its launcher says so.
fn split_cause(line: &str) -> (&str, Option<&str>) {
    let line = line.trim();
    if let Some((line, signal)) = line.rsplit_once(", died of ") {
        return (line, Some(signal));
    }
    match line.rsplit_once(", left with ") {
        Some((line, status)) => (line, Some(status)),
        None => (line, None),
    }
}

/// Ranks of which the same is told, in the order of the first of each.
pub(super) fn grouped<T: PartialEq>(
    told: impl IntoIterator<Item = (usize, T)>,
) -> Vec<(Vec<usize>, T)> {
    let mut groups: Vec<(Vec<usize>, T)> = Vec::new();
    for (rank, told) in told {
        match groups.iter_mut().find(|(_, same)| *same == told) {
            Some((ranks, _)) => ranks.push(rank),
            None => groups.push((vec![rank], told)),
        }
    }
    groups
}

/// `rank 1`, or `ranks 0, 2`.
pub(super) fn named(ranks: &[usize]) -> String {
    let s = if ranks.len() == 1 { "" } else { "s" };
    let numbers: Vec<_> = ranks.iter().map(usize::to_string).collect();
    format!("rank{s} {}", numbers.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks of which `-` has answered and the empty word says nothing.
    fn ranks(lines: &[&str]) -> Vec<LastSeen> {
        let seen = |(rank, line): (usize, &&str)| LastSeen {
            rank,
            line: (!line.is_empty()).then(|| format!("{line}\n")),
            has_answered: *line == "-",
        };
        lines.iter().enumerate().map(seen).collect()
    }

    #[test]
    fn who_waits_in_what_and_who_never_came() {
        let waits = |lines: &[&str]| waiting(3, &ranks(lines));
        let second = "case 3: forward, in all_to_all_single #2";
        let first = "case 3: forward, after all_to_all_single #1";
        assert_eq!(
            waits(&[second, first, second]).as_deref(),
            Some(
                "ranks 0, 2 wait in all_to_all_single #2 of forward; \
                 rank 1 never came: it is in forward, after all_to_all_single #1"
            )
        );
        assert_eq!(
            waits(&[first, "case 3: forward", second, "-", "-"]).as_deref(),
            Some(
                "rank 2 waits in all_to_all_single #2 of forward; \
                 rank 0 never came: it is in forward, after all_to_all_single #1; \
                 rank 1 never came: it is in forward; \
                 ranks 3, 4 never came: they have answered"
            )
        );
    }

    #[test]
    fn ranks_in_different_collectives_are_both_said_to_wait() {
        let lines = [
            "case 3: backward, in barrier #1",
            "case 3: forward, in send #2",
        ];
        let told = "rank 0 waits in barrier #1 of backward; rank 1 waits in send #2 of forward";
        assert_eq!(waiting(3, &ranks(&lines)).as_deref(), Some(told));
    }

    #[test]
    fn a_line_of_another_case_is_quoted_and_silence_is_told() {
        let lines = ["case 3: forward, in barrier #1", "case 2: answered", ""];
        let told = "rank 0 waits in barrier #1 of forward; \
                    rank 1 never came: it says `case 2: answered`; \
                    rank 2 never came: it says nothing";
        assert_eq!(waiting(3, &ranks(&lines)).as_deref(), Some(told));
    }

    #[test]
    fn where_no_rank_is_in_a_collective_there_is_nothing_to_tell() {
        let lines = ["case 3: forward", "case 2: forward, in barrier #1", "-", ""];
        assert_eq!(waiting(3, &ranks(&lines)), None);
    }

    #[test]
    fn hosts_are_told_where_there_are_several() {
        let hosts = [(0, "a"), (1, "b"), (2, "a"), (3, "b")];
        let told = "ranks 0, 2 are on a, ranks 1, 3 on b";
        assert_eq!(spread(hosts).as_deref(), Some(told));
        let told = "rank 2 is on a, rank 3 on b";
        assert_eq!(spread(hosts[2..].to_vec()).as_deref(), Some(told));
        assert_eq!(spread([(0, "a"), (1, "a")]), None);
    }

    #[test]
    fn where_a_rank_ended_and_of_what() {
        let told = |line: &str| ended(3, &ranks(&[line]));
        let inside = "case 3: backward, in all_reduce #1";
        assert_eq!(told(inside), "rank 0 ended in backward, in all_reduce #1");
        assert_eq!(
            told(&format!("{inside}, died of SIGSEGV")),
            "rank 0 ended (SIGSEGV) in backward, in all_reduce #1"
        );
        assert_eq!(
            told("case 3: forward, after barrier #2, left with exit status 7"),
            "rank 0 ended (exit status 7) in forward, after barrier #2"
        );
        assert_eq!(told("case 3: forward"), "rank 0 ended in forward");
        assert_eq!(told("case 2: answered"), "rank 0 ended (case 2: answered)");
        assert_eq!(told("-"), "rank 0 ended after its answer");
        assert_eq!(told(""), "rank 0 ended");
        assert_eq!(
            ended(3, &ranks(&["case 3: forward", inside])),
            "rank 0 ended in forward, rank 1 ended in backward, in all_reduce #1"
        );
    }
}
