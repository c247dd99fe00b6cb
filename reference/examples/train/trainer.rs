//! One rank's part of the training.

use super::{
    Result,
    arguments::Training,
    curve::Step,
    samples::{self, Samples},
    weights,
};
use std::sync::Arc;
use tch::{Device, Tensor};
use ulysses::{
    Communicator, DataLoaderAdapter, Epoch, IGNORE_INDEX, Llama, Mesh, ModelInput, Preparation,
    Reduction, Registration, Shard, optimizer::ShardedOptimizer, register_in_group,
};

/// A model, what moves it, and this rank's shards of the samples.
pub(crate) struct Trainer {
    training: Training,
    mesh: Mesh,
    model: Llama,
    optimizer: ShardedOptimizer,
    shards: Epoch<Samples>,
    steps: usize,
}

impl Trainer {
    /// All ranks of `world` call it together.
    pub(crate) fn new(world: Arc<dyn Communicator>, training: &Training) -> Result<Self> {
        let mesh = Mesh::new(world, training.mesh())?;
        let config = training.config()?;
        let weights = weights::initial(&config, training.seed)?;
        let mut model = Llama::new(config, weights, training.kind(), Device::Cpu)?;
        model.set_checkpointing(training.checkpointing);
        model.set_mlp_tiles(training.mlp_tiles)?;
        let registration = Registration {
            sequence_parallel_size: training.sp,
            ..Registration::default()
        };
        let group = Arc::clone(mesh.sequence_parallel());
        register_in_group(&mut model, Arc::clone(&group), &registration)?;
        let parameters = model.parameters().into_iter();
        let parameters: Vec<Tensor> = parameters.map(|(_, p)| p.shallow_clone()).collect();
        let optimizer = ShardedOptimizer::new(&mesh, &parameters, training.optimizer())?;
        let samples = Samples::of(training, mesh.coordinates())?;
        let mut adapter =
            DataLoaderAdapter::new(group, Preparation::default(), |_| samples.clone());
        Ok(Self {
            shards: adapter.epoch(),
            training: training.clone(),
            mesh,
            model,
            optimizer,
            steps: 0,
        })
    }

    /// All ranks call it together, and have the same numbers from it.
    pub(crate) fn step(&mut self) -> Result<Step> {
        let mut sum = 0.0;
        for sequence in 0..samples::of_a_replica(&self.training)? {
            if sequence > 0 {
                self.optimizer.end_of_backward()?;
            }
            let shard = self.shards.next().ok_or("the samples are at an end")??;
            let loss = self.loss(&shard)?;
            loss.f_backward()?;
            sum += loss.f_double_value(&[])?;
        }
        let sums = [sum.to_bits().cast_signed()];
        let sums = self.mesh.data_parallel().all_gather(&sums)?.concat();
        let sum: f64 = sums
            .into_iter()
            .map(|bits| f64::from_bits(bits.cast_unsigned()))
            .sum();
        self.optimizer
            .set_learning_rate(self.training.learning_rate(self.steps));
        let gradient_norm = self.optimizer.step()?;
        self.optimizer.zero_grad()?;
        self.steps += 1;
        Ok(Step {
            loss: sum / self.training.targets() as f64,
            gradient_norm,
        })
    }

    /// The sum over the tokens of a sequence, of which this rank has a shard.
    fn loss(&self, shard: &Shard) -> Result<Tensor> {
        let entry = |name| shard.get(name).ok_or(format!("a shard has no `{name}`"));
        let input = ModelInput {
            input_ids: entry("input_ids")?,
            position_ids: entry("position_ids")?,
            documents: None,
            attention_mask: None,
        };
        let (labels, tiles) = (entry("shift_labels")?, self.training.loss_tiles);
        Ok(self
            .model
            .loss(&input, labels, IGNORE_INDEX, Reduction::Sum, tiles)?)
    }

    pub(crate) fn weights(&self) -> impl Iterator<Item = &Tensor> {
        self.model
            .parameters()
            .into_iter()
            .map(|(_, tensor)| tensor)
    }
}
