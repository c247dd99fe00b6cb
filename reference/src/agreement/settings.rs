//! What must be the same on every rank, as one word each.

use crate::{
    call::{Call, Documents},
    core_attention::Mask,
    options::{Options, SequenceLength},
    token_partition::Sharding,
};

/// Something that every rank sets to the same.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    /// The argument that it belongs to.
    pub(super) argument: &'static str,
    /// What it is called.
    pub(super) name: &'static str,
    pub(super) word: i64,
    show: fn(i64) -> String,
}

/// No count, and no number: one of the patterns of bits that are no number.
const NONE: i64 = i64::MAX;

impl Setting {
    /// The value, as a person reads it.
    pub(super) fn shown(&self) -> String {
        (self.show)(self.word)
    }

    /// The same setting with another value.
    pub(super) fn with(self, word: i64) -> Self {
        Self { word, ..self }
    }

    fn new(argument: &'static str, name: &'static str, word: i64, show: fn(i64) -> String) -> Self {
        Self {
            argument,
            name,
            word,
            show,
        }
    }

    fn count(argument: &'static str, name: &'static str, count: Option<usize>) -> Self {
        let word = count.map_or(NONE, |count| count as i64);
        Self::new(argument, name, word, |word| match word {
            NONE => "none".to_owned(),
            count => count.to_string(),
        })
    }

    /// Compared by its bits: what differs in the last place differs.
    fn number(argument: &'static str, name: &'static str, number: Option<f64>) -> Self {
        let word = number.map_or(NONE, |number| number.to_bits().cast_signed());
        Self::new(argument, name, word, |word| match word {
            NONE => "none".to_owned(),
            bits => f64::from_bits(bits.cast_unsigned()).to_string(),
        })
    }
}

/// Everything that must be the same, in an order that is the same everywhere.
pub(super) fn of(options: &Options, call: &Call<'_>) -> Vec<Setting> {
    let score = &options.score;
    let sections = options.rotary.and_then(|rotary| rotary.sections);
    let section = |i: usize| sections.map(|sections| sections[i]);
    let global = match options.sequence_length {
        SequenceLength::Variable => None,
        SequenceLength::Fixed { global, .. } => Some(global),
    };
    let ends = match call.documents {
        Some(Documents::Ends(ends)) => Some(ends),
        _ => None,
    };
    let (count, number) = (Setting::count, Setting::number);
    vec![
        Setting::new("options", "mask", (score.mask == Mask::Causal).into(), mask),
        count("options", "window", score.window),
        number("options", "scale", score.scale),
        number("options", "soft cap", score.softcap),
        number("options", "rotary base", options.rotary.map(|r| r.base)),
        count("options", "first rotary section", section(0)),
        count("options", "second rotary section", section(1)),
        count("options", "third rotary section", section(2)),
        Setting::new(
            "options",
            "flag `uneven_heads`",
            options.uneven_heads.into(),
            flag,
        ),
        Setting::new("options", "sharding", options.sharding as i64, sharding),
        count("options", "fixed global length", global),
        count("options", "number of layers", options.skip_all_but_last),
        count("call", "layer", Some(call.layer)),
        Setting::new("call", "kind of documents", documents(call.documents), said),
        count("documents", "digest of the ends", ends.map(digest)),
        count(
            "layout",
            "block size",
            call.layout.map(|layout| layout.block()),
        ),
        number(
            "dropout",
            "probability",
            call.dropout.map(|d| d.probability),
        ),
        count("dropout", "seed", call.dropout.map(|d| d.seed as usize)),
        number(
            "head_norm",
            "epsilon",
            call.head_norm.map(|norm| norm.epsilon),
        ),
    ]
}

fn flag(word: i64) -> String {
    (word == 1).to_string()
}

fn mask(word: i64) -> String {
    let mask = if word == 1 { Mask::Causal } else { Mask::Full };
    format!("{mask:?}")
}

fn sharding(word: i64) -> String {
    let all = [Sharding::Contiguous, Sharding::Zigzag, Sharding::Striped];
    all.into_iter()
        .find(|&sharding| sharding as i64 == word)
        .map_or_else(|| word.to_string(), |sharding| format!("{sharding:?}"))
}

fn documents(documents: Option<Documents<'_>>) -> i64 {
    match documents {
        None => 0,
        Some(Documents::FromPositions) => 1,
        Some(Documents::Ends(_)) => 2,
    }
}

fn said(word: i64) -> String {
    ["none", "from positions", "by their ends"]
        .get(word as usize)
        .map_or_else(|| word.to_string(), |&said| said.to_owned())
}

/// A few bits of all ends: FNV-1a, by words.
fn digest(ends: &[Vec<usize>]) -> usize {
    let words = ends
        .iter()
        .flat_map(|row| row.iter().copied().chain([usize::MAX]));
    let fold = |digest: usize, word: usize| (digest ^ word).wrapping_mul(0x100_0000_01b3);
    words.fold(0xcbf2_9ce4_8422_2325, fold) >> 8
}
