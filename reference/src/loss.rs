//! Cross-entropy of tokens that lie on several ranks.
//!
//! It is one number, the same on all ranks: a sum over tokens of all ranks,
//! and its mean is over the tokens of all ranks that have a label. A mean of
//! the ranks' means would be another wherever they have different numbers of
//! labels, and not a number where one has none.
//!
//! Not here: shifting labels. A token's label is that of the next token, which
//! may lie on another rank, so that labels are shifted before the cut.

use crate::{
    agreement,
    autograd::{Function, apply},
    communicator::Communicator,
    core_attention::precise,
    error::{Error, Refusal, Result, refuse},
    tiled::Reduction,
};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// What a rank may be refused for, here or in tiles.
const ARGUMENTS: [&str; 6] = ["logits", "labels", "reduction", "hidden", "head", "tiles"];
/// Element types that logits may have.
const KINDS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half];

/// The cross-entropy of `logits` [B, s, V] of this rank's tokens with `labels`
/// [B, s], int64, over the tokens of all ranks.
///
/// Tokens whose label is `ignore_index` count for nothing. [`Reduction::Mean`]
/// is by the number of others on all ranks; if there is none anywhere, the loss
/// is 0 and so are all gradients. A rank may have no label, or no token.
/// [`Reduction::None`] gives this rank's losses alone, [B, s], with 0 where
/// the label is ignored.
///
/// Half types are computed and summed in float32, which is the element type of
/// the result; the ranks' sums are added in float64 in rank order.
///
/// `backward` does not communicate. On each rank it gives the derivative of
/// the one number by its own tokens, whose parts of a parameter's gradient add
/// up over ranks. What comes in as gradient is to be the same on all ranks.
///
/// # Errors
/// Refused on all ranks alike when on one of them the arguments do not fit, a
/// label is neither a class nor `ignore_index`, or the reduction is of tiles;
/// and when ranks differ in number of classes, element type, `ignore_index` or
/// reduction.
pub fn cross_entropy(
    communicator: &Arc<dyn Communicator>,
    logits: &Tensor,
    labels: &Tensor,
    ignore_index: i64,
    reduction: Reduction,
) -> Result<Tensor> {
    let rule = Rule {
        ignore_index,
        reduction,
    };
    let own = check(logits)
        .and_then(|[batch, tokens, classes]| rule.facts(logits, labels, [batch, tokens], classes));
    let valid = rule.agree(&**communicator, own)?;
    rule.over_ranks(communicator, valid, || rule.losses(logits, labels, false))
}

fn check(logits: &Tensor) -> Result<[i64; 3]> {
    if !logits.defined() {
        return refuse("logits", "is undefined", "give a tensor that holds data");
    }
    match logits.size()[..] {
        [batch, tokens, classes] => Ok([batch, tokens, classes]),
        ref size => refuse(
            "logits",
            format!("is {size:?}"),
            "give [batch, tokens, classes]",
        ),
    }
}

/// How many numbers stay in a processor's cache.
const CACHED: i64 = 1 << 17;

/// Which tokens count, and how their losses become one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) ignore_index: i64,
    pub(crate) reduction: Reduction,
}

impl Rule {
    /// What the other ranks must know: what has to be the same on all, and the
    /// number of tokens that count. `like` is what logits are made of.
    pub(crate) fn facts(
        self,
        like: &Tensor,
        labels: &Tensor,
        tokens: [i64; 2],
        classes: i64,
    ) -> Result<Vec<i64>> {
        let reduction = match self.reduction {
            Reduction::None => 0,
            Reduction::Mean => 1,
            Reduction::Sum => 2,
            Reduction::MeanOfTiles => {
                return refuse(
                    "reduction",
                    "is a mean of tiles, which tokens that count differently often have no use for",
                    "take the mean over tokens",
                );
            }
        };
        let kind = like.f_kind()?;
        let Some(kind) = KINDS.iter().position(|&known| known == kind) else {
            return refuse(
                "logits",
                format!("has element type {kind:?}"),
                format!("give one of {KINDS:?}"),
            );
        };
        if classes == 0 {
            return refuse("logits", "has no class", "give at least one");
        }
        let valid = self.count(like, labels, tokens, classes)?;
        Ok(vec![
            classes,
            kind as i64,
            self.ignore_index,
            reduction,
            valid,
        ])
    }

    /// How many labels there are that are not ignored.
    fn count(self, like: &Tensor, labels: &Tensor, tokens: [i64; 2], classes: i64) -> Result<i64> {
        if !labels.defined() {
            return refuse("labels", "is undefined", "give a tensor that holds data");
        }
        if labels.size() != tokens || labels.f_kind()? != Kind::Int64 {
            return refuse(
                "labels",
                format!("is {:?} {:?}", labels.f_kind()?, labels.size()),
                format!("give Int64 {tokens:?}, a label for each token"),
            );
        }
        if labels.device() != like.device() {
            return refuse(
                "labels",
                format!("is on {:?}", labels.device()),
                format!("put it on {:?}, where the rest is", like.device()),
            );
        }
        let counts = labels.f_ne(self.ignore_index)?;
        let outside = labels.f_lt(0)?.f_logical_or(&labels.f_ge(classes)?)?;
        let wrong = labels.f_masked_select(&outside.f_logical_and(&counts)?)?;
        if wrong.numel() > 0 {
            return refuse(
                "labels",
                format!(
                    "has {}, but there are {classes} classes",
                    wrong.f_int64_value(&[0])?
                ),
                format!(
                    "give labels below {classes}, or {} for tokens that do not count",
                    self.ignore_index
                ),
            );
        }
        Ok(counts.f_sum(Kind::Int64)?.f_int64_value(&[])?)
    }

    /// The number of tokens that count on all ranks, if they agree on the rest.
    pub(crate) fn agree(
        self,
        communicator: &dyn Communicator,
        own: Result<Vec<i64>>,
    ) -> Result<i64> {
        let all = agreement::gather(communicator, own, 5, &ARGUMENTS)?;
        let differs = |index: usize| all.iter().position(|facts| facts[index] != all[0][index]);
        for (index, argument, what) in [
            (0, "logits", "has another number of classes than on rank 0"),
            (1, "logits", "has another element type than on rank 0"),
            (
                2,
                "labels",
                "is read with another `ignore_index` than on rank 0",
            ),
            (3, "reduction", "is another than on rank 0"),
        ] {
            if let Some(rank) = differs(index) {
                return Err(Error::from(Refusal {
                    rank: Some(rank),
                    argument,
                    problem: what.to_owned(),
                    remedy: "give the same on every rank".to_owned(),
                }));
            }
        }
        Ok(all.iter().map(|facts| facts[4]).sum())
    }

    /// The losses of some tokens, [B, t], or their sum where they are reduced.
    ///
    /// `logits_are_spent` says that nobody reads the logits afterwards and that
    /// there is one backward at most: their memory is then used for what comes
    /// of them.
    pub(crate) fn losses(
        self,
        logits: &Tensor,
        labels: &Tensor,
        logits_are_spent: bool,
    ) -> Result<Tensor> {
        let size = logits.size();
        let [batch, tokens, classes] = size[..] else {
            return refuse("logits", format!("is {size:?}"), "give three dimensions");
        };
        let losses = TokenLosses {
            rule: self,
            labels: labels.f_reshape([batch * tokens])?,
            kind: logits.f_kind()?,
            logarithms: None,
            logits_are_spent,
        };
        let losses = apply(losses, &[&logits.f_reshape([batch * tokens, classes])?])?
            .into_iter()
            .next()
            .ok_or_else(|| Error::Libtorch("losses of tokens gave no output".to_owned()))?;
        match self.reduction {
            Reduction::None => Ok(losses.f_view([batch, tokens])?),
            _ => Ok(losses),
        }
    }

    /// From this rank's losses, or their sum, to what all ranks have.
    pub(crate) fn over_ranks(
        self,
        communicator: &Arc<dyn Communicator>,
        valid: i64,
        own: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let own = own().inspect_err(|error| communicator.abandon(&error.to_string()))?;
        let divisor = match self.reduction {
            Reduction::None => return Ok(own),
            Reduction::Mean => valid.max(1),
            _ => 1,
        };
        let over_ranks = OverRanks {
            communicator: Arc::clone(communicator),
            divisor: divisor as f64,
        };
        apply(over_ranks, &[&own])?
            .into_iter()
            .next()
            .ok_or_else(|| Error::Libtorch("a sum over ranks gave no output".to_owned()))
    }
}

/// The losses of tokens, or their sum, by logits [n, V].
///
/// libtorch's own steps make four tensors as large as the logits: logarithms of
/// the softmax, and three in backward. Here these become softmax(z) - y, times
/// the cotangent, in one other or, where logits are spent, in their own place.
struct TokenLosses {
    rule: Rule,
    /// [n].
    labels: Tensor,
    /// The element type of the logits.
    kind: Kind,
    /// Of the softmax.
    logarithms: Option<Tensor>,
    logits_are_spent: bool,
}

impl Function for TokenLosses {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let logarithms = match self.logits_are_spent && precise(self.kind) == self.kind {
            true => log_softmax_in_place(&inputs[0])?,
            false => inputs[0].f_log_softmax(-1, precise(self.kind))?,
        };
        let reduction = match self.rule.reduction {
            Reduction::None => tch::Reduction::None,
            _ => tch::Reduction::Sum,
        };
        let ignore_index = self.rule.ignore_index;
        let losses =
            logarithms.f_nll_loss(&self.labels, None::<&Tensor>, reduction, ignore_index)?;
        self.logarithms = Some(logarithms);
        Ok(vec![losses])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let kept = match self.logits_are_spent {
            true => self.logarithms.take(),
            false => self.logarithms.as_ref().map(Tensor::shallow_clone),
        };
        let Some(mut logarithms) = kept else {
            return Err(Error::Libtorch(
                "a loss ran back before forward, or twice".to_owned(),
            ));
        };
        let mut gradient = match self.logits_are_spent {
            true => logarithms.f_exp_()?,
            false => logarithms.f_exp()?,
        };
        // What is ignored may be no class; its row becomes 0 below.
        let last = logarithms.size()[1] - 1;
        let of_label = self.labels.f_clamp(0, last)?.f_unsqueeze(1)?;
        let one = Tensor::f_ones(of_label.size(), (gradient.f_kind()?, gradient.device()))?;
        let _ = gradient.f_scatter_add_(1, &of_label, &one.f_neg()?)?;
        let counts = self.labels.f_ne(self.rule.ignore_index)?.f_unsqueeze(1)?;
        let cotangent = match self.rule.reduction {
            Reduction::None => cotangents[0].f_unsqueeze(1)?,
            _ => cotangents[0].shallow_clone(),
        };
        let _ = gradient.f_mul_(&counts.f_to_kind(cotangent.f_kind()?)?.f_mul(&cotangent)?)?;
        Ok(vec![Some(gradient.f_to_kind(self.kind)?)])
    }
}

/// The logarithms of the softmax of each row of `x` [n, V], where `x` was.
fn log_softmax_in_place(x: &Tensor) -> Result<Tensor> {
    let (rows, classes) = x.size2()?;
    // On a CPU as many rows at a time as stay in a cache.
    let step = match x.device() {
        Device::Cpu => (CACHED / classes).max(1),
        _ => rows.max(1),
    };
    for first in (0..rows).step_by(step as usize) {
        let mut some = x.f_narrow(0, first, step.min(rows - first))?;
        let logarithms = some.f_log_softmax(-1, x.f_kind()?)?;
        some.f_copy_(&logarithms)?;
    }
    Ok(x.shallow_clone())
}

/// The sum of one scalar of each rank, divided; each rank has the derivative by
/// its own.
struct OverRanks {
    communicator: Arc<dyn Communicator>,
    divisor: f64,
}

impl Function for OverRanks {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let own = &inputs[0];
        let bits = own.f_double_value(&[])?.to_bits() as i64;
        let all = self.communicator.all_gather(&[bits])?;
        let sum: f64 = all
            .iter()
            .flatten()
            .map(|&bits| f64::from_bits(bits as u64))
            .sum();
        let options = (own.f_kind()?, own.device());
        Ok(vec![Tensor::f_full(
            [0i64; 0],
            sum / self.divisor,
            options,
        )?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(cotangents[0].f_div_scalar(self.divisor)?)])
    }
}
