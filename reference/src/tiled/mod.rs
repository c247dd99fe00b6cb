//! A function of a long sequence, computed tile by tile, so that only one
//! tile's intermediates exist at a time.
//!
//! Forward records nothing and keeps nothing but the inputs; backward runs the
//! function again on one tile after another. What a token costs in memory then
//! no longer depends on how wide the function is inside: the MLP
//! ([`tiled_mlp`]) is several times as wide as the model, logits
//! ([`tiled_logits_loss`]) are as wide as the vocabulary.
//!
//! Only for functions that treat each token for itself, or whose results over
//! tokens are a sum or a mean. Not here: attention, whose tiles see one another
//! (see [`core_attention`](mod@crate::core_attention)), and anything about
//! ranks but in [`tiled_logits_loss`].
//!
//! Source: Bekman et al., "Arctic Long Sequence Training", arXiv:2506.13996,
//! and DeepSpeed's `sequence_tiled_compute`, from whose rule for a mean this
//! departs (see [`Reduction`]).

mod check;
mod function;
mod logits_loss;
mod mlp;

pub use logits_loss::tiled_logits_loss;
pub use mlp::{SwiGlu, tiled_mlp};

use crate::{
    autograd::apply,
    error::{Error, Result, refuse},
};
use function::Tiled;
use std::ops::Range;
use tch::Tensor;

/// How the outputs of all tiles become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// One after another along the output dimension.
    None,
    /// The mean over tokens. Each tile gives the mean over its own, a scalar,
    /// which counts as often as the tile has tokens that count.
    ///
    /// A tile of which no token counts is not computed: the mean of nothing is
    /// often not a number. Where none counts at all the result is 0, and so
    /// are all gradients.
    #[default]
    Mean,
    /// The sum of what each tile gives, a scalar.
    Sum,
    /// DeepSpeed's rule for a mean: that of what each tile gives, a scalar,
    /// however many tokens a tile has or counts.
    ///
    /// It is the mean over tokens where all tiles count equally many. Where
    /// DeepSpeed computes tiles without tokens (5 tokens in 4 tiles), and its
    /// mean is not a number, here there are fewer tiles.
    MeanOfTiles,
}

/// What is computed in tiles, and how.
///
/// The names are those by which the function asks for its tensors.
#[derive(Debug, Clone, Copy)]
pub struct TiledCompute<'a> {
    /// How many tokens the tensors to shard have.
    pub sequence_length: usize,
    /// How many tiles to cut the sequence into: each of as many tokens as the
    /// first, but for the last one, which has the rest. There are fewer where
    /// one would have no token. At least 1; of an empty sequence there is one
    /// empty tile.
    pub tiles: usize,
    /// Tensors of which each tile sees its tokens alone.
    pub shard: &'a [(&'a str, &'a Tensor)],
    /// The dimension of the tokens in all of these; 1 by default.
    pub shard_dimension: usize,
    /// Tensors that each tile sees whole.
    pub pass: &'a [(&'a str, &'a Tensor)],
    /// The names of those, sharded or passed, that are given a gradient if they
    /// require one; the others are constants. By default all are given one.
    pub gradient: Option<&'a [&'a str]>,
    /// The weights of the function. Each is given its gradient once, after the
    /// last tile.
    pub parameters: &'a [&'a Tensor],
    /// The dimension of the tokens in what the function returns, where it is
    /// not reduced; 1 by default.
    pub output_dimension: usize,
    /// How the outputs of the tiles become one; the mean by default.
    pub reduction: Reduction,
    /// Which tokens count in [`Reduction::Mean`], and only there: bool, sharded
    /// as the others are. By default all.
    pub counted: Option<&'a Tensor>,
}

impl Default for TiledCompute<'_> {
    fn default() -> Self {
        Self {
            sequence_length: 0,
            tiles: 1,
            shard: &[],
            shard_dimension: 1,
            pass: &[],
            gradient: None,
            parameters: &[],
            output_dimension: 1,
            reduction: Reduction::default(),
            counted: None,
        }
    }
}

/// What the function is given of one tile.
pub struct Tile<'a> {
    names: &'a [String],
    /// The named tensors in the order of `names`, then the parameters.
    tensors: &'a [Tensor],
    tokens: Range<usize>,
}

impl Tile<'_> {
    /// The tensor of this name: the tile's part of one that is sharded, the
    /// whole of one that is passed.
    ///
    /// # Errors
    /// Refused when there is none of this name.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let named = self.names.iter().zip(self.tensors);
        match named.into_iter().find(|(known, _)| *known == name) {
            Some((_, tensor)) => Ok(tensor),
            None => refuse(
                "function",
                format!("asks for a tensor \"{name}\""),
                format!("give it to be sharded or passed, beside {:?}", self.names),
            ),
        }
    }

    /// The parameters, in the order in which they were given.
    pub fn parameters(&self) -> &[Tensor] {
        self.tensors.get(self.names.len()..).unwrap_or_default()
    }

    /// Which tokens of the sequence these are.
    pub fn tokens(&self) -> Range<usize> {
        self.tokens.clone()
    }
}

/// Computes `function` tile by tile, and again in backward.
///
/// Gradients reach the tensors and parameters of `compute` alone: whatever else
/// `function` holds is a constant. It is run twice on each tile and must do the
/// same both times, and does not see how many tiles there are unless it looks.
///
/// The gradient of a tensor that all tiles see is the sum over tiles, in
/// float32 for the half types.
///
/// # Errors
/// A refusal of what contradicts itself in `compute`, or of what `function`
/// returns: one scalar for each tile where it is to be reduced, otherwise a
/// tensor with one row for each token. The error of `function`. `backward()`
/// fails with the text of the error when the second run does, and when a
/// tensor was changed in place in between.
pub fn sequence_tiled_compute(
    function: impl Fn(&Tile<'_>) -> Result<Tensor> + Send + 'static,
    compute: &TiledCompute<'_>,
) -> Result<Tensor> {
    check::check(compute)?;
    let given = |name: &str| compute.gradient.is_none_or(|names| names.contains(&name));
    let named = compute.shard.iter().chain(compute.pass);
    let mut inputs: Vec<Tensor> = named
        .map(|&(name, tensor)| match given(name) {
            true => Ok(tensor.shallow_clone()),
            false => Ok(tensor.f_detach()?),
        })
        .collect::<Result<_>>()?;
    inputs.extend(
        compute
            .parameters
            .iter()
            .map(|tensor| tensor.shallow_clone()),
    );
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    apply(Tiled::new(function, compute)?, &inputs)?
        .into_iter()
        .next()
        .ok_or_else(|| Error::Libtorch("tiled compute gave no output".to_owned()))
}
