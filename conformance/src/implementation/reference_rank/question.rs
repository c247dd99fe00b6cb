//! From what a rank is told to the arguments of the reference.

use fixtures::exchange::{AttentionInfo, CaseInfo, Tensors, tensor};
use tch::Tensor;
use ulysses::{
    BlockLayout, Call, CallDropout, Documents, HeadNorm, Kernel, Mask, Options, Rotary, Score,
    SequenceLength, Sharding,
};

use super::super::Means;
use super::strides;
use crate::tensor::from_array_on;

/// Added to the mean square of a head before it is normalised.
const NORM_EPSILON: f64 = 1e-6;

/// A question, as the reference is asked it.
pub(crate) struct Question {
    pub(crate) options: Options,
    /// Q, K and V, then what belongs to heads, each by its name.
    pub(crate) leaves: Vec<(&'static str, Tensor)>,
    pub(crate) dout: Tensor,
    pub(crate) brought: Brought,
}

/// What a call brings and no gradient is asked of, and where among the leaves
/// the rest is.
pub(crate) struct Brought {
    pub(super) layers: usize,
    position_ids: Tensor,
    documents: Option<Option<Vec<Vec<usize>>>>,
    attention_mask: Option<Tensor>,
    layout: Option<BlockLayout>,
    dropout: Option<CallDropout>,
    slopes: Option<usize>,
    sinks: Option<usize>,
    norms: Option<usize>,
}

impl Question {
    /// Reads what a rank is told, onto a device. An error is what the reference would have
    /// said of it, or what is wrong with the exchange.
    pub(crate) fn read(
        told: &CaseInfo,
        case: &AttentionInfo,
        inputs: &Tensors,
        means: Means,
    ) -> Result<Question, String> {
        let input = |name| {
            let tensor = from_array_on(means.device, tensor(inputs, name)?);
            tensor.map_err(|error| error.to_string())
        };
        let mut leaves = Vec::new();
        let [q, k, v] = ["q", "k", "v"].map(input);
        let [q, k, v] = strides::lay_out(&case.strides, [q?, k?, v?])?;
        leaves.extend([("q", q), ("k", k), ("v", v)]);
        let mut head_state = |is_there: bool, names: &[&'static str]| {
            let place = leaves.len();
            for &name in names.iter().filter(|_| is_there) {
                leaves.push((name, input(name)?));
            }
            Ok::<_, String>(is_there.then_some(place))
        };
        let slopes = head_state(case.alibi, &["slopes"])?;
        let sinks = head_state(case.sinks, &["sinks"])?;
        let norms = head_state(case.norms, &["q_norm", "k_norm"])?;
        for (_, leaf) in &mut leaves {
            *leaf = leaf
                .f_set_requires_grad(true)
                .map_err(|error| error.to_string())?;
        }
        let optional = |is_there: bool, name| is_there.then(|| input(name)).transpose();
        let layout = optional(case.block_size.is_some(), "layout")?
            .zip(case.block_size)
            .map(|(visible, block)| BlockLayout::new(&visible, block))
            .transpose()
            .map_err(|error| error.to_string())?;
        let documents = match case.documents.as_deref() {
            None => None,
            Some("positions") => Some(None),
            Some("ends") => Some(Some(rows(&input("document_ends")?)?)),
            Some(other) => return Err(unknown("documents", other, "positions or ends")),
        };
        Ok(Question {
            options: options(told, case, means.kernel)?,
            leaves,
            dout: input("dout")?,
            brought: Brought {
                layers: case.layers.unwrap_or(1),
                position_ids: input("position_ids")?,
                documents,
                attention_mask: optional(case.padding, "attention_mask")?,
                layout,
                dropout: case.dropout.map(|probability| CallDropout {
                    probability,
                    seed: case.seed,
                }),
                slopes,
                sinks,
                norms,
            },
        })
    }
}

impl Brought {
    /// The call of one layer, with the head state among `leaves`.
    pub(crate) fn call<'a>(&'a self, leaves: &[&'a Tensor], layer: usize) -> Call<'a> {
        let leaf = |place: Option<usize>| place.map(|place| leaves[place]);
        Call {
            position_ids: Some(&self.position_ids),
            documents: self.documents.as_ref().map(|ends| match ends {
                None => Documents::FromPositions,
                Some(ends) => Documents::Ends(ends),
            }),
            attention_mask: self.attention_mask.as_ref(),
            layout: self.layout.as_ref(),
            slopes: leaf(self.slopes),
            sinks: leaf(self.sinks),
            head_norm: self.norms.map(|place| HeadNorm {
                query: leaves[place],
                key: leaves[place + 1],
                epsilon: NORM_EPSILON,
            }),
            dropout: self.dropout,
            layer,
        }
    }

    /// The same on the same memory, for a forward that is run again.
    pub(super) fn shallow_clone(&self) -> Brought {
        Brought {
            position_ids: self.position_ids.shallow_clone(),
            documents: self.documents.clone(),
            attention_mask: self.attention_mask.as_ref().map(Tensor::shallow_clone),
            layout: self.layout.clone(),
            ..*self
        }
    }
}

fn options(told: &CaseInfo, case: &AttentionInfo, kernel: Kernel) -> Result<Options, String> {
    let mask = match case.mask.as_str() {
        "full" => Mask::Full,
        "causal" => Mask::Causal,
        other => return Err(unknown("mask", other, "full or causal")),
    };
    let sharding = match case.sharding.as_str() {
        "contiguous" => Sharding::Contiguous,
        "zigzag" => Sharding::Zigzag,
        "striped" => Sharding::Striped,
        other => return Err(unknown("sharding", other, "contiguous, zigzag or striped")),
    };
    let sequence_length = case.fixed_sequence.map(|global| {
        // Every rank holds its share of the length that the attention is for.
        let each = global / told.world;
        let local = each + usize::from(told.rank < global % told.world);
        SequenceLength::Fixed { local, global }
    });
    Ok(Options {
        kernel,
        score: Score {
            mask,
            window: case.window,
            scale: case.scale,
            softcap: case.softcap,
        },
        rotary: case.rotary.as_ref().map(|rotary| Rotary {
            base: rotary.base,
            sections: rotary.sections,
        }),
        uneven_heads: true,
        sharding,
        sequence_length: sequence_length.unwrap_or_default(),
        disable_in_eval: true,
        skip_all_but_last: case.layers,
    })
}

/// The rows of an integer tensor [rows, columns].
fn rows(tensor: &Tensor) -> Result<Vec<Vec<usize>>, String> {
    let rows = Vec::<Vec<i64>>::try_from(tensor).map_err(|error| error.to_string())?;
    let to_usize = |row: Vec<i64>| row.into_iter().map(|end| end.max(0) as usize).collect();
    Ok(rows.into_iter().map(to_usize).collect())
}

fn unknown(what: &str, given: &str, known: &str) -> String {
    format!("`{what}` is `{given}`; it is {known}")
}
