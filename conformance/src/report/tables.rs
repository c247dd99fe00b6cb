//! Tables over a whole run.

use std::ops::RangeBounds;
use std::time::Duration;

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use fixtures::exchange::Declared;
use fixtures::{Dtype, Profile};

use crate::judge::{self, Comparison, Verdict};
use crate::oracle::AnswerTensor;
use crate::runner::{Record, Summary};

/// Who is judged by another convention than the default, a line each.
pub fn declared(summaries: &[Summary]) -> String {
    let mut lines = Vec::new();
    for summary in summaries {
        for record in &summary.records {
            let line = format!("{} declares {}.\n", summary.implementation, record.declared);
            if record.declared != Declared::default() && !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    match lines.is_empty() {
        true => String::new(),
        false => lines.concat() + "\n",
    }
}

/// How many cases of each implementation have each verdict.
pub fn verdicts(summaries: &[Summary]) -> String {
    let header = ["implementation", "cases"]
        .into_iter()
        .chain(Verdict::ALL.map(Verdict::name));
    let rows = summaries.iter().map(|summary| {
        let counts = Verdict::ALL.map(|verdict| summary.count(verdict).to_string());
        [
            summary.implementation.clone(),
            summary.records.len().to_string(),
        ]
        .into_iter()
        .chain(counts)
        .collect()
    });
    table(header, rows.collect(), 1..)
}

/// How near the right answers are, for each implementation and element type: of
/// each tensor how many are bit-equal to dense attention by the same kernel, and
/// how far the worst number is off relative to what it may be; of gradients of head state and of
/// how far errors lean to one side the latter alone.
pub fn closeness(summaries: &[Summary]) -> Option<String> {
    let header = ["implementation", "dtype", "answers"]
        .into_iter()
        .chain(AnswerTensor::ALWAYS.map(AnswerTensor::name))
        .chain(["head state", "lean"]);
    let of_dtype = |summary: &Summary, dtype: Dtype| {
        let comparisons: Vec<_> = summary
            .records
            .iter()
            .filter(|record| {
                record
                    .case
                    .attention()
                    .is_some_and(|case| case.dtype == dtype)
            })
            .filter(|record| record.judgement.verdict.is_right())
            .filter_map(|record| record.judgement.comparison.as_ref())
            .collect();
        let always = AnswerTensor::ALWAYS.map(|tensor| {
            let of_tensor = || comparisons.iter().filter_map(|c| c.of(tensor));
            let exact = of_tensor().filter(|tensor| tensor.is_exact).count();
            let worst = of_tensor().map(|tensor| tensor.tightness);
            format!("{exact} / {:.2}", worst.fold(0.0, f64::max))
        });
        let tensors = || {
            comparisons
                .iter()
                .flat_map(|comparison| &comparison.tensors)
        };
        let head_state = tensors()
            .filter(|tensor| tensor.is_sum)
            .map(|tensor| tensor.tightness);
        let lean = tensors().map(|tensor| tensor.lean.abs());
        (!comparisons.is_empty()).then(|| {
            [
                summary.implementation.clone(),
                dtype.to_string(),
                comparisons.len().to_string(),
            ]
            .into_iter()
            .chain(always)
            .chain(
                [head_state.fold(0.0, f64::max), lean.fold(0.0, f64::max)]
                    .map(|x| format!("{x:.2}")),
            )
            .collect()
        })
    };
    let rows = summaries.iter().flat_map(|summary| {
        Dtype::FLOATS
            .into_iter()
            .filter_map(move |dtype| of_dtype(summary, dtype))
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then(|| table(header, rows, 2..))
}

/// How near the right answers of the other profiles are, for each implementation
/// and profile: how many are the right ones rounded once, and how far the worst
/// number is off relative to what it may be.
pub fn closeness_of_profiles(summaries: &[Summary]) -> Option<String> {
    let header = ["implementation", "profile", "answers", "exact", "worst"];
    let of_profile = |summary: &Summary, profile: Profile| {
        let right: Vec<_> = summary
            .records
            .iter()
            .filter(|record| record.case.profile() == profile)
            .filter(|record| record.judgement.verdict.is_right())
            .collect();
        let exact = right
            .iter()
            .filter(|record| record.judgement.verdict == Verdict::Exact);
        let tensors = right
            .iter()
            .filter_map(|record| record.judgement.comparison.as_ref())
            .flat_map(|comparison| &comparison.tensors);
        let worst = tensors.map(|tensor| tensor.tightness).fold(0.0, f64::max);
        (!right.is_empty()).then(|| {
            vec![
                summary.implementation.clone(),
                profile.name().to_owned(),
                right.len().to_string(),
                exact.count().to_string(),
                format!("{worst:.2}"),
            ]
        })
    };
    let others = Profile::ALL.into_iter();
    let others = others.filter(|&profile| profile != Profile::Attention);
    let rows: Vec<_> = others
        .flat_map(|profile| {
            summaries
                .iter()
                .filter_map(move |summary| of_profile(summary, profile))
        })
        .collect();
    (!rows.is_empty()).then(|| table(header, rows, 2..))
}

/// How probable it is that the run blamed an honest implementation.
pub fn chance(summaries: &[Summary]) -> String {
    let records = summaries.iter().flat_map(|summary| &summary.records);
    let numbers: usize = records
        .filter_map(|record| record.judgement.comparison.as_ref())
        .map(Comparison::numbers)
        .sum();
    format!(
        "{numbers} numbers were compared, each with {:.2} times the root of what its roundings \
         may be, squared\nand summed. That this blames an honest implementation once has a \
         probability of at most {:.0e}.\n",
        judge::lambda(),
        judge::false_alarm(numbers)
    )
}

/// What an answered case costs each implementation in the median, and where; if
/// one was answered.
pub fn costs(summaries: &[Summary]) -> Option<String> {
    let header = [
        "implementation",
        "starting",
        "forward + backward",
        "exchange",
        "judge",
    ];
    let rows = summaries.iter().filter_map(|summary| {
        let asked: Vec<_> = summary
            .records
            .iter()
            .filter(|record| record.judgement.comparison.is_some())
            .collect();
        let of = |cost: fn(&Record) -> Duration| median(asked.iter().map(|record| cost(record)));
        Some(vec![
            summary.implementation.clone(),
            format!("{:.1} s", summary.starting.as_secs_f64()),
            milliseconds(of(|record| record.computed)?),
            milliseconds(of(|record| record.asked.saturating_sub(record.computed))?),
            milliseconds(of(|record| record.judged)?),
        ])
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then(|| table(header, rows, 1..))
}

fn median(durations: impl Iterator<Item = Duration>) -> Option<Duration> {
    let mut durations: Vec<_> = durations.collect();
    durations.sort();
    durations.get(durations.len() / 2).copied()
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// The columns of `numbers` stand to the right.
pub(crate) fn table(
    header: impl IntoIterator<Item = impl Into<comfy_table::Cell>>,
    rows: Vec<Vec<String>>,
    numbers: impl RangeBounds<usize>,
) -> String {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for (place, column) in table.column_iter_mut().enumerate() {
        if numbers.contains(&place) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{table}\n")
}
