//! One forward and backward of long sequences, for `tiles.py`: how much memory
//! it needs above its inputs, and how long it takes.
//!
//! `mlp untiled 98304 16` (function, how, tokens, tiles) prints bytes and
//! seconds as JSON. A process measures one alone, because a peak is that of
//! all that a process has done.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

use procfs::process::Process;
use std::{env, fs, hint::black_box, sync::Arc};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Communicator, Reduction, SwiGlu, ThreadCommunicator,
    autograd::{Function, apply},
    cross_entropy, tiled_logits_loss, tiled_mlp,
};

const FEATURES: i64 = 512;
/// 3.5 times the features, as in Llama 3 8B.
const WIDE: i64 = 1792;
const CLASSES: i64 = 32768;
const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn main() {
    tch::set_num_threads(1);
    // cargo adds a flag of its own.
    let words: Vec<String> = env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let [function, how, tokens, tiles] = &words[..] else {
        // `cargo test --benches` and `cargo bench` without words.
        return println!("for tiles.py: give function, how, tokens and tiles");
    };
    let tiles = match how.as_str() {
        "untiled" => None,
        "ulysses" => Some(tiles.parse().unwrap()),
        _ => panic!("\"{how}\" is neither untiled nor ulysses"),
    };
    let work: fn(i64, Option<usize>, Measure<'_>) = match function.as_str() {
        "mlp" => mlp,
        "loss" => loss,
        _ => panic!("\"{function}\" is neither mlp nor loss"),
    };
    work(64, tiles, &|pass| pass()); // What libraries set up once.
    work(tokens.parse().unwrap(), tiles, &|pass| {
        let (resident, seconds) = (reset_peak(), processor_seconds());
        pass();
        let bytes = status(|status| status.vmhwm) - resident;
        let seconds = processor_seconds() - seconds;
        println!("{{\"bytes\": {bytes}, \"seconds\": {seconds}}}");
    });
}

/// What is done with one pass.
type Measure<'a> = &'a dyn Fn(&mut dyn FnMut());

/// Gives `measure` one pass; inputs and cotangent are there before.
fn mlp(tokens: i64, tiles: Option<usize>, measure: Measure<'_>) {
    let hidden = leaf(&[1, tokens, FEATURES]);
    let (gate, up) = (leaf(&[WIDE, FEATURES]), leaf(&[WIDE, FEATURES]));
    let down = leaf(&[FEATURES, WIDE]);
    let cotangent = Tensor::rand([1, tokens, FEATURES], FLOAT);
    measure(&mut || {
        let by = |weight: &Tensor| hidden.linear(weight, None::<&Tensor>);
        let output = match tiles {
            None => (by(&gate).silu() * by(&up)).linear(&down, None::<&Tensor>),
            Some(tiles) => {
                let (gate, up, down) = (&gate, &up, &down);
                tiled_mlp(&hidden, &SwiGlu { gate, up, down }, tiles).unwrap()
            }
        };
        let start = Start(cotangent.shallow_clone());
        let start = apply(start, &[&output]).unwrap();
        let leaves = [&hidden, &gate, &up, &down];
        black_box(Tensor::run_backward(&start, &leaves, false, false));
        drop(output); // It lives as long as in a model that goes on with it.
    });
}

fn loss(tokens: i64, tiles: Option<usize>, measure: Measure<'_>) {
    let world = ThreadCommunicator::world(1).remove(0);
    let world: Arc<dyn Communicator> = Arc::new(world);
    let (hidden, head) = (leaf(&[1, tokens, FEATURES]), leaf(&[CLASSES, FEATURES]));
    let labels = Tensor::randint(CLASSES, [1, tokens], (Kind::Int64, Device::Cpu));
    measure(&mut || {
        let (ignored, mean) = (-100, Reduction::Mean);
        let loss = match tiles {
            None => {
                let logits = hidden.linear(&head, None::<&Tensor>);
                cross_entropy(&world, &logits, &labels, ignored, mean)
            }
            Some(tiles) => tiled_logits_loss(&world, &hidden, &head, &labels, ignored, mean, tiles),
        };
        let leaves = [&hidden, &head];
        black_box(Tensor::run_backward(
            &[loss.unwrap()],
            &leaves,
            false,
            false,
        ));
    });
}

fn leaf(size: &[i64]) -> Tensor {
    (Tensor::rand(size, FLOAT) * 0.1).set_requires_grad(true)
}

/// Backward from a cotangent that is there already: tch starts from ones only.
struct Start(Tensor);

impl Function for Start {
    fn forward(&mut self, _: &[Tensor]) -> ulysses::Result<Vec<Tensor>> {
        Ok(vec![Tensor::zeros([0i64; 0], FLOAT)])
    }

    fn backward(&mut self, _: &[Tensor]) -> ulysses::Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.0.shallow_clone())])
    }
}

/// Forgets the peak so far; what is resident now, in bytes.
fn reset_peak() -> u64 {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    status(|status| status.vmrss)
}

fn status(field: impl Fn(&procfs::process::Status) -> Option<u64>) -> u64 {
    field(&Process::myself().unwrap().status().unwrap()).unwrap() * 1024
}

/// Of this process so far. It has one thread, and the machine others to serve.
fn processor_seconds() -> f64 {
    let stat = Process::myself().unwrap().stat().unwrap();
    (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64
}
