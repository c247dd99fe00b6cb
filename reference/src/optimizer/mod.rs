//! An optimizer whose state is sharded over a mesh.
//!
//! Every rank has all parameters, and what its own tokens make of their
//! gradients: parts that add up over the ranks that share a sequence, and over
//! replicas. Of what an optimizer keeps besides, each of `dp_shard` x `sp` ranks
//! has one part: it gets the sum of the gradients of its elements, moves these
//! elements, and gives them to the others. `dp_replicate` copies do the same
//! with the same bits. A step is that of the whole optimizer on one process, but
//! for the order in which gradients are added.
//!
//! Not here: parameters that are sharded between steps (stage three), and
//! learning rates that differ between parameters.
//!
//! Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training
//! Trillion Parameter Models", arXiv:1910.02054.

mod agreement;
mod partition;
mod reduction;
mod update;

pub use partition::Partition;
pub use update::Update;

use crate::{
    autograd::take_gradient,
    communicator::{Communicator, collectives},
    error::{Result, refuse},
    mesh::Mesh,
};
use reduction::{Reducer, Reduction};
use std::sync::Arc;
use tch::{Kind, Tensor};
use update::State;

/// What is sharded beside the optimizer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Nothing: gradients stay whole on every rank, and are summed in a step.
    One,
    /// Gradients: each is summed at its owners and freed as soon as backward has
    /// completed it, beside what backward still does. `.grad` is then undefined.
    Two,
}

/// By what the sum of all ranks' gradients is divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GradientScale {
    /// By nothing: the loss is one number over the tokens of all ranks, of which
    /// each rank's backward gives a share.
    Sum,
    /// By the number of data-parallel replicas: each has a loss of its own, of
    /// which the ranks of its sequence have shares, and their mean is wanted.
    MeanOfReplicas,
    /// By this number.
    Divide(f64),
}

impl GradientScale {
    /// The divisor in a mesh of so many data-parallel replicas.
    pub fn divisor(self, replicas: usize) -> f64 {
        match self {
            GradientScale::Sum => 1.0,
            GradientScale::MeanOfReplicas => replicas as f64,
            GradientScale::Divide(divisor) => divisor,
        }
    }
}

/// The dtype of what is kept between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateKind {
    /// That of the parameter.
    Parameter,
    /// float32 where the parameter's is narrower, with weights kept in float32
    /// too; that of the parameter elsewhere.
    Widened,
}

/// What an optimizer does; the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// What is sharded.
    pub stage: Stage,
    /// What a gradient does to a parameter.
    pub update: Update,
    /// By what the sum of gradients is divided.
    pub scale: GradientScale,
    /// The greatest norm of all gradients together; a greater one is scaled
    /// down to it, as by `torch.nn.utils.clip_grad_norm_`.
    pub clip: Option<f64>,
    /// The dtype of what is kept.
    pub state: StateKind,
}

/// One rank's part of an optimizer.
pub struct ShardedOptimizer {
    options: Options,
    divisor: f64,
    world: Arc<dyn Communicator>,
    reduction: Reduction,
    reducer: Option<Reducer>,
    /// Those that are not frozen.
    parameters: Vec<Tensor>,
    states: Vec<State>,
    /// In stage two this rank's parts of the gradients of this step.
    gradients: Vec<Option<Tensor>>,
}

impl ShardedOptimizer {
    /// An optimizer of `parameters`, in the same order on every rank. All ranks
    /// call it together.
    ///
    /// Those that require no gradient now are left alone for good.
    ///
    /// # Errors
    /// The same refusal on every rank when options or parameters differ between
    /// ranks, values included, when a number of the options makes no step, or a
    /// parameter is no leaf, not of floating point, or given twice; those of
    /// the communicator.
    pub fn new(mesh: &Mesh, parameters: &[Tensor], options: Options) -> Result<Self> {
        agreement::reach(&**mesh.world(), parameters, &options)?;
        let parameters: Vec<Tensor> = parameters
            .iter()
            .filter(|parameter| parameter.requires_grad())
            .map(Tensor::shallow_clone)
            .collect();
        let elements: Vec<i64> = parameters.iter().map(|p| p.numel() as i64).collect();
        let kinds = parameters.iter().map(Tensor::f_kind);
        let kinds = kinds.collect::<std::result::Result<Vec<_>, _>>()?;
        let reduction = Reduction {
            sharding: Arc::clone(mesh.sharding()),
            replicate: Arc::clone(mesh.data_parallel_replicate()),
            partition: Arc::new(Partition::new(&elements, mesh.sharding().size())),
            shapes: Arc::new(elements.into_iter().zip(kinds).collect()),
        };
        let reducer = match options.stage {
            Stage::One => None,
            Stage::Two => Some(Reducer::start(&reduction, &parameters)?),
        };
        Ok(Self {
            options,
            divisor: options.scale.divisor(mesh.shape().data_parallel()),
            world: Arc::clone(mesh.world()),
            states: parameters.iter().map(|_| State::default()).collect(),
            gradients: parameters.iter().map(|_| None).collect(),
            reduction,
            reducer,
            parameters,
        })
    }

    /// Ends a backward that no step follows yet, so that gradients of several
    /// add up. All ranks call it together, between two backwards. In stage one,
    /// where they add up in `.grad`, there is nothing to do.
    ///
    /// # Errors
    /// When a parameter had two gradients since the last end; those of the
    /// communicator.
    pub fn end_of_backward(&mut self) -> Result<()> {
        let Some(reducer) = &self.reducer else {
            return Ok(());
        };
        let parts = reducer.end_of_backward()?;
        let _guard = tch::no_grad_guard();
        for (kept, part) in self.gradients.iter_mut().zip(parts) {
            let Some(part) = part else { continue };
            *kept = Some(match kept.take() {
                None => part.f_to_kind(self.options.state.of(part.f_kind()?))?,
                Some(mut kept) => kept.f_add_(&part)?,
            });
        }
        Ok(())
    }

    /// Moves every parameter that has a gradient on any rank, and gives the norm
    /// of all gradients together, scaled but not clipped. All ranks call it
    /// together, after backward.
    ///
    /// Gradients stay until [`zero_grad`](Self::zero_grad).
    ///
    /// # Errors
    /// The same refusal on every rank when learning rates differ between ranks;
    /// those of [`end_of_backward`](Self::end_of_backward).
    pub fn step(&mut self) -> Result<f64> {
        self.agree_on_learning_rate()?;
        self.end_of_backward()?;
        let _guard = tch::no_grad_guard();
        let gradients = self.scaled_gradients()?;
        let norm = self.norm(&gradients)?;
        let clip = self.options.clip.map(|most| most / (norm + 1e-6));
        for (index, gradient) in gradients.into_iter().enumerate() {
            let Some(mut gradient) = gradient else {
                continue;
            };
            // A norm that is no number makes none of every gradient, as torch does.
            if let Some(factor) = clip.filter(|factor| *factor < 1.0 || factor.is_nan()) {
                gradient = gradient.f_mul_scalar_(factor)?;
            }
            self.move_parameter(index, gradient)?;
        }
        Ok(norm)
    }

    /// Frees the gradients of this step, on this rank.
    ///
    /// In stage two those of a backward that has not been ended stay.
    ///
    /// # Errors
    /// Those of libtorch.
    pub fn zero_grad(&mut self) -> Result<()> {
        self.gradients.fill_with(|| None);
        for parameter in &self.parameters {
            drop(take_gradient(parameter)?);
        }
        Ok(())
    }

    /// From the next step on, on every rank.
    pub fn set_learning_rate(&mut self, learning_rate: f64) {
        self.options.update.set_learning_rate(learning_rate);
    }

    /// What this rank keeps between steps besides parameters and gradients.
    pub fn state_bytes(&self) -> usize {
        self.states.iter().map(State::bytes).sum()
    }

    fn agree_on_learning_rate(&self) -> Result<()> {
        let rate = self.options.update.learning_rate();
        let rates = self.world.all_gather(&[rate.to_bits().cast_signed()])?;
        if rates.iter().any(|rate| rate != &rates[0]) {
            let remedy = "set the same on every rank";
            return refuse("learning_rate", "differs between ranks", remedy);
        }
        self.options.update.check()
    }

    /// This rank's parts of the sums of gradients, divided.
    fn scaled_gradients(&self) -> Result<Vec<Option<Tensor>>> {
        let scaled = |(index, kept): (usize, &Option<Tensor>)| {
            let part = match (&self.reducer, kept) {
                (Some(_), kept) => kept.as_ref().map(Tensor::shallow_clone),
                (None, _) => {
                    let gradient = self.parameters[index].f_grad()?;
                    let gradient = gradient.defined().then_some(gradient);
                    self.reduction.sum(index, gradient)?
                }
            };
            part.map(|part| {
                let wide = part.f_to_kind(self.options.state.of(part.f_kind()?))?;
                Ok(wide.f_div_scalar(self.divisor)?)
            })
            .transpose()
        };
        self.gradients.iter().enumerate().map(scaled).collect()
    }

    /// The root of the sum of all squares, the same bits on every rank.
    fn norm(&self, gradients: &[Option<Tensor>]) -> Result<f64> {
        let mut own = 0.0;
        for gradient in gradients.iter().flatten() {
            let wide = gradient.f_to_kind(Kind::Double)?;
            own += wide
                .f_mul(&wide)?
                .f_sum(Kind::Double)?
                .f_double_value(&[])?;
        }
        let parts = self
            .reduction
            .sharding
            .all_gather(&[own.to_bits().cast_signed()])?;
        let square = |words: Vec<i64>| {
            words
                .into_iter()
                .map(|bits| f64::from_bits(bits.cast_unsigned()))
        };
        Ok(parts.into_iter().flat_map(square).sum::<f64>().sqrt())
    }

    /// Moves this rank's part of a parameter, and gets the others'.
    fn move_parameter(&mut self, index: usize, gradient: Tensor) -> Result<()> {
        let parameter = self.parameters[index].f_detach()?;
        let state = &mut self.states[index];
        let sharding = &self.reduction.sharding;
        let (start, count) = self.reduction.partition.part(index, sharding.rank());
        let mut weight = match state.weight.take() {
            Some(weight) => weight,
            None => {
                let own = parameter.f_reshape([-1])?.f_narrow(0, start, count)?;
                own.f_detach_copy()?.f_to_kind(gradient.f_kind()?)?
            }
        };
        self.options.update.apply(&mut weight, gradient, state)?;
        let moved = weight.f_to_kind(parameter.f_kind()?)?;
        if self.options.state.of(parameter.f_kind()?) != parameter.f_kind()? {
            state.weight = Some(weight);
        }
        let counts = self.reduction.partition.counts(index);
        let whole = collectives::all_gather(&**sharding, &moved, counts)?;
        let whole = whole.f_view(parameter.size().as_slice())?;
        Ok(parameter.shallow_clone().f_copy_(&whole)?)
    }
}

impl StateKind {
    /// The dtype in which a parameter of this one is moved.
    fn of(self, kind: Kind) -> Kind {
        match (self, kind) {
            (StateKind::Widened, Kind::Half | Kind::BFloat16) => Kind::Float,
            _ => kind,
        }
    }
}
