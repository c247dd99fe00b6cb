//! Tera-operations per second and GPU.

use super::model;
use crate::{
    cost::flops::{Rule, tera_per_second},
    error::Result,
};

/// A published iteration and its throughput.
#[derive(Debug, Clone, Copy)]
pub struct ThroughputRow {
    /// The paper's table.
    pub table: &'static str,
    /// What is trained, with what.
    pub what: &'static str,
    /// By name.
    pub model: &'static str,
    /// How the paper counts.
    pub rule: Rule,
    /// In a batch.
    pub sequences: u64,
    /// S.
    pub sequence: u64,
    /// GPUs that share the batch.
    pub gpus: u64,
    /// Of one iteration.
    pub seconds: f64,
    /// TFLOPS per GPU as printed.
    pub published: f64,
    /// What else is to be known.
    pub note: &'static str,
}

impl ThroughputRow {
    /// TFLOPS per GPU by the paper's rule.
    ///
    /// # Errors
    /// None for the rows of [`throughputs`].
    pub fn predicted(&self) -> Result<f64> {
        let model = model(self.model)?;
        let flops = self.rule.of_all(&model, self.sequences, self.sequence)?;
        Ok(tera_per_second(flops, self.gpus, self.seconds))
    }

    /// Whether seconds and length are printed exactly enough for the row to
    /// say anything: an iteration of a minute or more, or with its
    /// milliseconds, and a length that its own paper does not contradict.
    pub fn is_exact(&self) -> bool {
        (self.seconds >= 60.0 || self.rule == Rule::Ulysses) && self.note != OTHER_LENGTH
    }
}

const OTHER_LENGTH: &str = "the length in the text, which the recipe contradicts";
const RECIPE: &str = "the length of the recipe";
const COARSE: &str = "seconds rounded coarsely";
const FITS_36K: &str = "seconds rounded coarsely; the recipe has 36K";

/// All rows.
pub fn throughputs() -> Vec<ThroughputRow> {
    let ulysses = |table, sequence, gpus, milliseconds: f64, published| ThroughputRow {
        table,
        what: "GPT-7B, 8 sequences",
        model: "GPT-7B",
        rule: Rule::Ulysses,
        sequences: 8,
        sequence,
        gpus,
        seconds: milliseconds / 1e3,
        published,
        note: "sizes of the model inferred",
    };
    let alst = |table, what, sequence, gpus, seconds, published, note| ThroughputRow {
        table,
        what,
        model: "Llama-3.1-8B",
        rule: Rule::Alst,
        sequences: 1,
        sequence,
        gpus,
        seconds,
        published,
        note,
    };
    // Without sequence parallelism each GPU has a sequence of its own, which
    // is counted as one GPU's.
    vec![
        ulysses("Ulysses 2", 131_072, 64, 32432.13, 165.53),
        ulysses("Ulysses 2", 131_072, 128, 17052.51, 157.41),
        ulysses("Ulysses 2", 131_072, 256, 9886.7, 136.09),
        ulysses("Ulysses 3", 65_536, 64, 9676.76, 161.36),
        ulysses("Ulysses 3", 262_144, 256, 33486.5, 147.4),
        alst("ALST 1", "baseline", 32_000, 1, 17.0, 231.6, COARSE),
        alst("ALST 1", "+ tiled loss", 160_000, 1, 123.0, 514.4, ""),
        alst("ALST 1", "+ Ulysses SP 8", 1_100_000, 8, 564.0, 576.1, ""),
        alst("ALST 1", "+ TiledMLP", 1_200_000, 8, 703.0, 548.7, ""),
        alst("ALST 1", "SP 8 + offload", 2_400_000, 8, 2610.0, 585.8, ""),
        alst("ALST 1", "all", 3_800_000, 8, 6455.0, 590.6, RECIPE),
        alst("ALST 1", "all", 3_700_000, 8, 6455.0, 590.6, OTHER_LENGTH),
        alst(
            "ALST 2",
            "baseline, 1 GPU",
            32_000,
            1,
            26.0,
            189.4,
            FITS_36K,
        ),
        alst("ALST 2", "all, 1 GPU", 500_000, 1, 1010.0, 548.1, ""),
        alst(
            "ALST 4",
            "baseline, 32 GPUs",
            32_000,
            1,
            12.0,
            393.6,
            COARSE,
        ),
        alst(
            "ALST 4",
            "all, 32 GPUs",
            15_500_000,
            32,
            26709.0,
            590.6,
            RECIPE,
        ),
        alst(
            "ALST 4",
            "all, 32 GPUs",
            15_000_000,
            32,
            26709.0,
            590.6,
            OTHER_LENGTH,
        ),
    ]
}
