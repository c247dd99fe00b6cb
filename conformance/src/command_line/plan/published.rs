//! The published rows, each beside what is said of it here.

use ulysses::Result;
use ulysses::cost::published::{lengths, readings, sizes, throughputs};

use super::grouped;
use super::quantities::limited;
use crate::report::table;

/// One table for each kind of row, with what it is worth.
pub(super) fn tables() -> Result<String> {
    Ok([throughput()?, length()?, reading()?, size()?].join("\n"))
}

fn ratio(predicted: f64, published: f64) -> String {
    format!("{:.3}", predicted / published)
}

fn throughput() -> Result<String> {
    let header = [
        "table",
        "what",
        "S",
        "GPUs",
        "seconds",
        "published",
        "predicted",
        "ratio",
        "note",
    ];
    let rows = throughputs().into_iter().map(|row| {
        let predicted = row.predicted()?;
        Ok(vec![
            row.table.to_owned(),
            row.what.to_owned(),
            grouped(row.sequence.into()),
            row.gpus.to_string(),
            format!("{:.2}", row.seconds),
            format!("{:.1}", row.published),
            format!("{predicted:.1}"),
            ratio(predicted, row.published),
            row.note.to_owned(),
        ])
    });
    let told = "TFLOPS per GPU, counted by the papers' own rules. A GPU that shares its sequence with\n\
                no other counts as one.\n\n";
    Ok(told.to_owned() + &table(header, rows.collect::<Result<_>>()?, 2..8))
}

fn length() -> Result<String> {
    let header = [
        "model",
        "what",
        "published",
        "predicted",
        "ratio",
        "ended by",
    ];
    let rows = lengths().into_iter().map(|row| {
        let (predicted, limit) = row.predicted()?;
        Ok(vec![
            row.model.to_owned(),
            row.what.to_owned(),
            grouped(row.published.into()),
            grouped(predicted.into()),
            ratio(predicted as f64, row.published as f64),
            limited(limit).to_owned(),
        ])
    });
    let told = "The longest sequence, by a fit whose constants were chosen after seeing these rows:\n\
                within 20 % for Llama-3.1-8B, elsewhere an upper bound. H100 where nothing is said.\n\n";
    Ok(told.to_owned() + &table(header, rows.collect::<Result<_>>()?, 2..5))
}

fn reading() -> Result<String> {
    let header = ["model", "what", "S", "published", "predicted", "ratio"];
    let rows = readings().into_iter().map(|row| {
        let predicted = row.predicted()?;
        Ok(vec![
            row.model.to_owned(),
            row.what.to_owned(),
            grouped(row.sequence.into()),
            format!("{:.2}", row.published),
            format!("{predicted:.2}"),
            ratio(predicted, row.published),
        ])
    });
    let told = "GiB of a GPU that nvml told, by the same fit.\n\n";
    Ok(told.to_owned() + &table(header, rows.collect::<Result<_>>()?, 2..))
}

fn size() -> Result<String> {
    let header = ["what", "unit", "published", "predicted", "ratio"];
    let rows = sizes()?.into_iter().map(|row| {
        vec![
            row.what.to_owned(),
            row.unit.to_owned(),
            row.published.to_string(),
            format!("{:.3}", row.predicted),
            ratio(row.predicted, row.published),
        ]
    });
    let told = "Sizes of single things, exact; the paper cuts off digits.\n\n";
    Ok(told.to_owned() + &table(header, rows.collect(), 2..))
}
