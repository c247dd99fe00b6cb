//! How the reference answers in the profile `tiled`.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use fixtures::Array;
use fixtures::exchange::{Tensors, tensor};
use fixtures::tiled::TiledInfo;
use tch::{Device, Kind, TchError, Tensor};
use ulysses::autograd::{HookHandle, on_gradient_ready};
use ulysses::{
    Communicator, Reduction, SwiGlu, ThreadCommunicator, Tile, TiledCompute,
    sequence_tiled_compute, tiled_logits_loss, tiled_mlp,
};

use super::gradients;
use crate::tensor::{from_array_on, kind, to_array};

/// What may have a gradient.
const INPUTS: [&str; 7] = ["hidden", "scale", "gate", "up", "down", "weight", "head"];

pub(super) fn answer(
    device: Device,
    info: &TiledInfo,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    let said = |error: TchError| error.to_string();
    let mut brought = Vec::new();
    for name in INPUTS.into_iter().filter(|&name| inputs.contains_key(name)) {
        let is_trained = info.gradients.iter().any(|trained| trained == name);
        let leaf = from_array_on(device, tensor(inputs, name)?).map_err(said)?;
        let leaf = leaf.f_set_requires_grad(is_trained).map_err(said)?;
        brought.push((name, leaf));
    }
    let labels = inputs
        .get("labels")
        .map(|labels| from_array_on(device, labels))
        .transpose();
    let computed = Computed {
        info,
        brought: &brought,
        labels: labels.map_err(said)?,
    };
    let signals = info.signals.iter();
    let signals = signals.map(|name| Signals::of(computed.brought(name)?));
    let signals = signals.collect::<Result<Vec<_>, _>>()?;
    let out = computed.out()?;
    let dout = from_array_on(device, tensor(inputs, "dout")?).map_err(said)?;
    out.f_mul(&dout)
        .and_then(|products| products.f_sum(out.kind()))
        .and_then(|sum| sum.f_backward())
        .map_err(said)?;
    let out = out.f_detach().map_err(said)?;
    let out_dtype = tensor(inputs, "dout")?.dtype;
    let trained: Vec<_> = brought
        .into_iter()
        .filter(|(_, leaf)| leaf.requires_grad())
        .collect();
    let mut answer = gradients(&trained, info.dtype)?;
    answer.insert("out".to_owned(), to_array(&out, out_dtype).map_err(said)?);
    if !signals.is_empty() {
        let counts: Vec<i64> = signals.iter().map(Signals::count).collect();
        let counts = Array::from_i64(&[counts.len()], &counts);
        answer.insert("gradient_signals".to_owned(), counts);
    }
    Ok(answer)
}

/// How often the gradient of a parameter is announced.
struct Signals {
    count: Arc<AtomicI64>,
    _hook: HookHandle,
}

impl Signals {
    fn of(parameter: &Tensor) -> Result<Signals, String> {
        let count = Arc::new(AtomicI64::new(0));
        let counted = Arc::clone(&count);
        let hook = on_gradient_ready(parameter, move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        Ok(Signals {
            count,
            _hook: hook.map_err(|error| error.to_string())?,
        })
    }

    fn count(&self) -> i64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// What is computed, and of what.
struct Computed<'a> {
    info: &'a TiledInfo,
    brought: &'a [(&'static str, Tensor)],
    labels: Option<Tensor>,
}

impl Computed<'_> {
    fn brought(&self, name: &str) -> Result<&Tensor, String> {
        let mut brought = self.brought.iter();
        let found = brought.find(|(known, _)| *known == name);
        found
            .map(|(_, tensor)| tensor)
            .ok_or_else(|| format!("the tensor `{name}` is missing"))
    }

    fn labels(&self) -> Result<&Tensor, String> {
        let missing = || "the tensor `labels` is missing".to_owned();
        self.labels.as_ref().ok_or_else(missing)
    }

    fn has_scale(&self) -> bool {
        self.brought("scale").is_ok()
    }

    /// The output, by what is made for the function where that will do.
    fn out(&self) -> Result<Tensor, String> {
        let (hidden, tiles) = (self.brought("hidden")?, self.info.tiles);
        let reduction = self.reduction()?;
        let out = match self.info.function.as_str() {
            "mlp" if !self.has_scale() => {
                let weights = SwiGlu {
                    gate: self.brought("gate")?,
                    up: self.brought("up")?,
                    down: self.brought("down")?,
                };
                tiled_mlp(hidden, &weights, tiles)
            }
            "nll" if !self.has_scale() && reduction != Reduction::MeanOfTiles => tiled_logits_loss(
                &alone()?,
                hidden,
                self.brought("head")?,
                self.labels()?,
                self.info.ignore_index,
                reduction,
                tiles,
            ),
            "mlp" => self.general(&["gate", "up", "down"], reduction, |x, tile| {
                let [gate, up, down] = [0, 1, 2].map(|place| &tile.parameters()[place]);
                let gate = linear(x, gate)?.f_silu()?;
                linear(&gate.f_mul(&linear(x, up)?)?, down)
            }),
            "affine" => self.general(&["weight"], reduction, |x, tile| {
                linear(x, &tile.parameters()[0])
            }),
            "nll" => {
                let (wide, ignore_index) = (self.loss_kind(), self.info.ignore_index);
                self.general(&["head"], reduction, move |x, tile| {
                    let logits = linear(x, &tile.parameters()[0])?;
                    let labels = tile.tensor("labels")?;
                    nll(
                        &logits.f_log_softmax(-1, wide)?,
                        labels,
                        ignore_index,
                        reduction,
                    )
                })
            }
            other => return Err(unknown("function", other, "mlp, affine or nll")),
        };
        out.map_err(|error| error.to_string())
    }

    fn reduction(&self) -> Result<Reduction, String> {
        match self.info.reduction.as_deref() {
            None | Some("none") => Ok(Reduction::None),
            Some("mean") => Ok(Reduction::Mean),
            Some("sum") => Ok(Reduction::Sum),
            Some("mean-of-tiles") => Ok(Reduction::MeanOfTiles),
            Some(other) => Err(unknown(
                "reduction",
                other,
                "none, mean, sum or mean-of-tiles",
            )),
        }
    }

    fn loss_kind(&self) -> Kind {
        match kind(self.info.dtype) {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        }
    }

    /// The output by what is made for any function: one of the tokens of a tile,
    /// scaled if there is a scale, and of what else the tile has.
    fn general(
        &self,
        weights: &[&str],
        reduction: Reduction,
        function: impl Fn(&Tensor, &Tile<'_>) -> ulysses::Result<Tensor> + Send + 'static,
    ) -> ulysses::Result<Tensor> {
        let given = |name: &'static str| Some((name, self.brought(name).ok()?));
        let labels = self.labels.as_ref().map(|labels| ("labels", labels));
        let shard: Vec<_> = given("hidden").into_iter().chain(labels).collect();
        let pass: Vec<_> = given("scale").into_iter().collect();
        let parameters: Vec<_> = weights
            .iter()
            .filter_map(|name| self.brought(name).ok())
            .collect();
        let has_scale = !pass.is_empty();
        let counted = match (&self.labels, reduction) {
            (Some(labels), Reduction::Mean) => Some(labels.f_ne(self.info.ignore_index)?),
            _ => None,
        };
        let tokens = self.brought("hidden").map_or(0, |hidden| hidden.size()[1]);
        sequence_tiled_compute(
            move |tile| {
                let hidden = tile.tensor("hidden")?;
                match has_scale {
                    true => function(&hidden.f_mul(tile.tensor("scale")?)?, tile),
                    false => function(hidden, tile),
                }
            },
            &TiledCompute {
                sequence_length: tokens as usize,
                tiles: self.info.tiles,
                shard: &shard,
                pass: &pass,
                parameters: &parameters,
                reduction,
                counted: counted.as_ref(),
                ..TiledCompute::default()
            },
        )
    }
}

fn linear(x: &Tensor, weight: &Tensor) -> ulysses::Result<Tensor> {
    Ok(x.f_linear(weight, None::<&Tensor>)?)
}

/// The losses of a tile, or what a tile is to give of them.
fn nll(
    logarithms: &Tensor,
    labels: &Tensor,
    ignore_index: i64,
    reduction: Reduction,
) -> ulysses::Result<Tensor> {
    let of_tile = match reduction {
        Reduction::None => tch::Reduction::None,
        Reduction::Sum => tch::Reduction::Sum,
        Reduction::Mean | Reduction::MeanOfTiles => tch::Reduction::Mean,
    };
    let classes = logarithms.size().last().copied().unwrap_or(1);
    let losses = logarithms
        .f_reshape([labels.numel() as i64, classes])?
        .f_nll_loss(
            &labels.f_reshape([-1])?,
            None::<&Tensor>,
            of_tile,
            ignore_index,
        )?;
    match reduction {
        Reduction::None => Ok(losses.f_view(&labels.size()[..])?),
        _ => Ok(losses),
    }
}

/// A rank by itself: the loss is that of its own tokens.
fn alone() -> Result<Arc<dyn Communicator>, String> {
    let alone = ThreadCommunicator::world(1).into_iter().next();
    let alone = alone.ok_or_else(|| "there is no rank".to_owned())?;
    Ok(Arc::new(alone))
}

fn unknown(what: &str, given: &str, known: &str) -> String {
    format!("`{what}` is `{given}`; it is {known}")
}
