//! Tables over a whole run.

use std::time::Duration;

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use fixtures::Dtype;

use crate::judge::Verdict;
use crate::oracle::AnswerTensor;
use crate::runner::{Record, Summary};

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
    table(header, rows.collect(), 1)
}

/// How near the right answers are, for each implementation and element type:
/// how many are bit-equal to dense SDPA, and how far the worst row is off
/// relative to what it may be.
pub fn closeness(summaries: &[Summary]) -> Option<String> {
    let names = AnswerTensor::ALWAYS.map(|tensor| format!("{} = SDPA", tensor.name()));
    let header = ["implementation", "dtype", "answers"]
        .map(str::to_owned)
        .into_iter()
        .chain(names)
        .chain(["worst row".to_owned()]);
    let of_dtype = |summary: &Summary, dtype: Dtype| {
        let comparisons: Vec<_> = summary
            .records
            .iter()
            .filter(|record| record.case.dtype == dtype)
            .filter(|record| !record.judgement.verdict.is_failure())
            .filter_map(|record| record.judgement.comparison.as_ref())
            .collect();
        let exact = AnswerTensor::ALWAYS.map(|tensor| {
            let of_tensor = comparisons.iter().filter_map(|c| c.of(tensor));
            let exact = of_tensor.filter(|tensor| tensor.is_exact);
            exact.count().to_string()
        });
        let worst = comparisons
            .iter()
            .flat_map(|comparison| &comparison.tensors)
            .fold(0.0, |worst, tensor| tensor.tightness.max(worst));
        (!comparisons.is_empty()).then(|| {
            [
                summary.implementation.clone(),
                dtype.to_string(),
                comparisons.len().to_string(),
            ]
            .into_iter()
            .chain(exact)
            .chain([format!("{worst:.2}")])
            .collect()
        })
    };
    let rows = summaries.iter().flat_map(|summary| {
        Dtype::FLOATS
            .into_iter()
            .filter_map(move |dtype| of_dtype(summary, dtype))
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then(|| table(header, rows, 2))
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
    (!rows.is_empty()).then(|| table(header, rows, 1))
}

fn median(durations: impl Iterator<Item = Duration>) -> Option<Duration> {
    let mut durations: Vec<_> = durations.collect();
    durations.sort();
    durations.get(durations.len() / 2).copied()
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// Columns from `first_number` on are numbers, and stand to the right.
fn table(
    header: impl IntoIterator<Item = impl Into<comfy_table::Cell>>,
    rows: Vec<Vec<String>>,
    first_number: usize,
) -> String {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(first_number) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}
