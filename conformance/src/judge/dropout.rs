//! Which attention weights were dropped, and whether by chance.
//!
//! V is one-hot: channel t of `out` is the weight of key t. What of it is zero
//! was dropped, and what was kept is its right value divided by `1 - p`. The
//! mask that is so recovered is then the oracle's and the yardstick's own: the
//! gradients must be those of this very mask.
//!
//! A mask is a matter of chance, and so is what is said of it here. With n
//! independent draws of probability q, the share of those that came true is
//! further off than to `a` with a probability of at most
//! `2 exp(-n KL(a || q))`, where `KL` is the relative entropy (Hoeffding,
//! "Probability inequalities for sums of bounded random variables", 1963,
//! theorem 1). What is less probable than [`FALSE_ALARM`], over all that is
//! tested of one answer, is the implementation's fault.

use fixtures::AttentionCase;

use super::padding::PaddingTokens;
use super::{Judgement, Verdict};
use crate::diagnosis::Mistake;

/// The probability, over all that is tested of one answer, that masks which are
/// drawn as they should be are called wrong.
pub const FALSE_ALARM: f64 = 1e-9;

/// What a number may be off beside the eighth of a kept weight: the least
/// positive float16.
const LEAST: f64 = 1.0 / (1 << 24) as f64;

/// A kept weight below this may be zero by rounding, and says nothing.
const LEGIBLE: f64 = 16.0 * LEAST;

/// For each weight, `[batch, query heads, tokens, KV tokens]`, 0 where it was
/// dropped and `1 / (1 - p)` where it was kept, recovered from `out` and what
/// it is without dropout, `undropped`.
///
/// # Errors
///
/// The judgement, if that is not what dropout does, or cannot be told.
pub(super) fn recover(
    case: &AttentionCase,
    probability: f64,
    undropped: &[f64],
    out: &[f64],
) -> Result<Vec<f64>, Judgement> {
    let (tokens, keys, channels) = (case.sequence, case.kv_sequence(), case.value_size());
    if channels < keys {
        let sentence = format!("{keys} weights cannot be read from {channels} channels");
        return Err(Judgement::new(Verdict::Unclear, sentence));
    }
    let padding = PaddingTokens::of(case);
    let gain = 1.0 / (1.0 - probability);
    let mut multiplier = Vec::with_capacity(case.batch * case.query_heads * tokens * keys);
    let mut masks = Vec::new();
    for batch in 0..case.batch {
        for head in 0..case.query_heads {
            let mut drops = Vec::with_capacity(tokens * keys);
            for query in 0..tokens {
                let row = ((batch * tokens + query) * case.query_heads + head) * channels;
                for key in 0..keys {
                    let (kept, is) = (undropped[row + key] * gain, out[row + key]);
                    let is_legible = kept >= LEGIBLE && !padding.holds(batch, query);
                    let is_dropped = is < kept / 2.0;
                    let off = if is_dropped {
                        is.abs()
                    } else {
                        (is - kept).abs()
                    };
                    let is_near = off <= kept / 8.0 + LEAST;
                    if is_legible && !is_near {
                        return Err(Judgement::new(
                            Verdict::Fail,
                            format!(
                                "a weight is neither dropped nor kept and divided by \
                                 1 - {probability}: batch {batch}, head {head}, query {query}, \
                                 key {key} has {is:.3e}, where 0 or {kept:.3e} is due"
                            ),
                        ));
                    }
                    drops.push(is_legible.then_some(is_dropped));
                    multiplier.push(if is_legible && is_dropped { 0.0 } else { gain });
                }
            }
            masks.push(Mask { batch, head, drops });
        }
    }
    hold_against_chance(probability, &masks)?;
    Ok(multiplier)
}

/// What one head of one sequence dropped.
struct Mask {
    batch: usize,
    head: usize,
    /// Whether each weight was dropped; none where that cannot be told.
    drops: Vec<Option<bool>>,
}

/// Holds rate and independence of the masks against what chance may do.
fn hold_against_chance(probability: f64, masks: &[Mask]) -> Result<(), Judgement> {
    let pairs = masks.len() * (masks.len() - 1) / 2;
    let chance = Chance {
        // 2 exp(-n KL) is FALSE_ALARM, shared out to each test.
        limit: (2.0 * (1 + pairs) as f64 / FALSE_ALARM).ln(),
    };
    let drops = masks.iter().flat_map(|mask| &mask.drops).flatten();
    let (count, dropped) = drops.fold((0, 0), |(n, d), &drop| (n + 1, d + usize::from(drop)));
    chance.allows(count, dropped, probability, || {
        format!("{dropped} of {count} weights are dropped, each with probability {probability}")
    })?;
    // Of two independent masks one drops what the other keeps.
    let differ = 2.0 * probability * (1.0 - probability);
    for (i, a) in masks.iter().enumerate() {
        for b in &masks[..i] {
            let both = a.drops.iter().zip(&b.drops).filter_map(|(a, b)| a.zip(*b));
            let (count, differing) =
                both.fold((0, 0), |(n, d), (a, b)| (n + 1, d + usize::from(a != b)));
            chance.allows(count, differing, differ, || {
                format!(
                    "the masks of batch {}, head {} and batch {}, head {} differ in {differing} \
                     of {count} weights, where independent masks differ in about {:.0}",
                    b.batch,
                    b.head,
                    a.batch,
                    a.head,
                    differ * count as f64
                )
            })
            .map_err(|judgement| match judgement.verdict {
                Verdict::Fail if (differing as f64) < differ * count as f64 => {
                    judgement.named(Mistake::DropoutShared)
                }
                _ => judgement,
            })?;
        }
    }
    Ok(())
}

/// How improbable is too improbable.
struct Chance {
    limit: f64,
}

impl Chance {
    /// Whether `came` of `count` draws of this probability may be chance, and
    /// whether none of them could not be.
    fn allows(
        &self,
        count: usize,
        came: usize,
        probability: f64,
        what: impl Fn() -> String,
    ) -> Result<(), Judgement> {
        let n = count as f64;
        if n * relative_entropy(0.0, probability) <= self.limit {
            let sentence = format!("{}: too few to tell chance from fault", what());
            return Err(Judgement::new(Verdict::Unclear, sentence));
        }
        if n * relative_entropy(came as f64 / n, probability) <= self.limit {
            return Ok(());
        }
        let sentence = format!(
            "{} (an honest implementation is blamed in one of {:.0e} answers at most)",
            what(),
            1.0 / FALSE_ALARM
        );
        Err(Judgement::new(Verdict::Fail, sentence))
    }
}

/// KL(a || q) of two probabilities.
fn relative_entropy(a: f64, q: f64) -> f64 {
    let term = |a: f64, q: f64| if a == 0.0 { 0.0 } else { a * (a / q).ln() };
    term(a, q) + term(1.0 - a, 1.0 - q)
}
