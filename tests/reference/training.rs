//! A tiny model that is trained on a mesh and on one process.
//!
//! Two matrices and tanh, on replicas of eleven tokens each. One parameter is
//! frozen, one is used in every other step, one by a single token of one replica
//! in every other step, and one by nobody.
// Each test program uses its own part of this.
#![allow(dead_code)]

use crate::world::{noise, uneven_shards};
use std::sync::Arc;
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};
use ulysses::{
    Communicator, Mesh, MeshShape,
    optimizer::{GradientScale, Options, ShardedOptimizer, Stage, StateKind, Update},
};

pub(crate) const STEPS: usize = 5;
const TOKENS: usize = 11;

pub(crate) const ADAMW: Update = Update::AdamW {
    learning_rate: 0.05,
    betas: (0.9, 0.95),
    epsilon: 1e-6,
    weight_decay: 0.1,
};

pub(crate) const SGD: Update = Update::Sgd {
    learning_rate: 0.5,
    momentum: 0.8,
    weight_decay: 0.01,
};

pub(crate) fn options(stage: Stage, update: Update) -> Options {
    Options {
        stage,
        update,
        scale: GradientScale::Sum,
        clip: None,
        state: StateKind::Parameter,
    }
}

pub(crate) fn shape([dp_replicate, dp_shard, sp]: [usize; 3]) -> MeshShape {
    MeshShape {
        dp_replicate,
        dp_shard,
        sp,
    }
}

fn random(seed: u64, rows: i64, columns: i64) -> Tensor {
    noise(seed, [rows, columns, 1, 1], Kind::Double).view([rows, columns])
}

/// First, bias, second, frozen, sometimes, rare, unused.
pub(crate) fn parameters() -> Vec<Tensor> {
    let sizes = [[7, 5], [1, 7], [3, 7], [1, 3], [1, 3], [1, 3], [2, 2]];
    let made = sizes.into_iter().zip(10..);
    made.map(|([rows, columns], seed)| {
        let frozen = seed == 13;
        random(seed, rows, columns).set_requires_grad(!frozen)
    })
    .collect()
}

/// The sum of squared errors of some tokens of a replica in a step.
pub(crate) fn loss(
    parameters: &[Tensor],
    step: usize,
    replica: usize,
    tokens: std::ops::Range<usize>,
) -> Tensor {
    let seed = (100 + 10 * step + replica) as u64;
    let (start, count) = (tokens.start as i64, tokens.len() as i64);
    let input = random(seed, TOKENS as i64, 5).narrow(0, start, count);
    let target = random(seed + 1000, TOKENS as i64, 3).narrow(0, start, count);
    let hidden = (input.matmul(&parameters[0].tr()) + &parameters[1]).tanh();
    let mut error = hidden.matmul(&parameters[2].tr()) + &parameters[3] - target;
    if step % 2 == 1 {
        error += &parameters[4];
        if replica == 0 && tokens.start == 0 {
            let first = Tensor::zeros([count, 1], (Kind::Double, Device::Cpu));
            let _ = first.get(0).fill_(1.0);
            error += first * &parameters[5];
        }
    }
    (&error * &error).sum(Kind::Double)
}

/// By what a replica's sum of squared errors is divided.
fn divisor(scale: GradientScale, replicas: usize) -> f64 {
    let tokens = match scale {
        GradientScale::Sum => TOKENS * replicas,
        GradientScale::MeanOfReplicas => TOKENS,
        // The optimizer divides.
        GradientScale::Divide(_) => 1,
    };
    tokens as f64
}

/// The weights, and the norms of gradients, after [`STEPS`] steps on a mesh.
pub(crate) fn on_mesh(
    world: Arc<dyn Communicator>,
    shape: MeshShape,
    options: Options,
) -> (Vec<Tensor>, Vec<f64>) {
    let mesh = Mesh::new(world, shape).unwrap();
    let parameters = parameters();
    let mut optimizer = ShardedOptimizer::new(&mesh, &parameters, options).unwrap();
    let at = mesh.coordinates();
    let replica = at.dp_replicate * shape.dp_shard + at.dp_shard;
    let shards = uneven_shards(TOKENS, shape.sp);
    let start: usize = shards[..at.sp].iter().sum();
    let norms = (0..STEPS)
        .map(|step| {
            let own = loss(&parameters, step, replica, start..start + shards[at.sp]);
            (own / divisor(options.scale, shape.data_parallel())).backward();
            let norm = optimizer.step().unwrap();
            optimizer.zero_grad().unwrap();
            norm
        })
        .collect();
    (detached(&parameters), norms)
}

pub(crate) fn detached(parameters: &[Tensor]) -> Vec<Tensor> {
    parameters.iter().map(Tensor::detach).collect()
}

/// The same by libtorch's own optimizer, on all tokens of all replicas.
pub(crate) fn by_libtorch(replicas: usize, options: Options) -> (Vec<Tensor>, Vec<f64>) {
    let mut store = nn::VarStore::new(Device::Cpu);
    let made = parameters().into_iter().enumerate().map(|(i, initial)| {
        if initial.requires_grad() {
            store.root().var_copy(&i.to_string(), &initial)
        } else {
            initial
        }
    });
    let parameters: Vec<_> = made.collect();
    // It made them in float32.
    store.double();
    for (parameter, initial) in parameters.iter().zip(self::parameters()) {
        tch::no_grad(|| parameter.shallow_clone().copy_(&initial));
    }
    let mut optimizer = match options.update {
        Update::Sgd {
            learning_rate,
            momentum,
            weight_decay,
        } => nn::sgd(momentum, 0.0, weight_decay, false).build(&store, learning_rate),
        Update::AdamW {
            learning_rate,
            betas,
            epsilon,
            weight_decay,
        } => nn::adamw(betas.0, betas.1, weight_decay)
            .eps(epsilon)
            .build(&store, learning_rate),
    }
    .unwrap();
    let trained = || {
        parameters
            .iter()
            .filter(|parameter| parameter.requires_grad())
    };
    let norms = (0..STEPS)
        .map(|step| {
            optimizer.zero_grad();
            let total: Tensor = (0..replicas)
                .map(|replica| loss(&parameters, step, replica, 0..TOKENS))
                .sum();
            (total / (TOKENS * replicas) as f64).backward();
            let squares = trained().map(Tensor::grad).filter(Tensor::defined);
            let norm = squares
                .map(|gradient| (&gradient * &gradient).sum(Kind::Double).double_value(&[]))
                .sum::<f64>()
                .sqrt();
            if let Some(most) = options.clip {
                optimizer.clip_grad_norm(most);
            }
            optimizer.step();
            norm
        })
        .collect();
    (detached(&parameters), norms)
}

/// The greatest difference, over the greatest of the numbers.
pub(crate) fn difference(got: &[Tensor], due: &[Tensor]) -> f64 {
    assert_eq!(got.len(), due.len());
    let pairs = got.iter().zip(due);
    let differences = pairs.map(|(got, due)| {
        let most = (got - due).abs().max().double_value(&[]);
        most / due.abs().max().double_value(&[])
    });
    differences.fold(0.0, f64::max)
}
