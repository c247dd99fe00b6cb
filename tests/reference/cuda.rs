//! The reference on CUDA devices, its ranks as threads.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../simulated_cuda/mod.rs"]
mod simulated_cuda;
mod world;

use std::{
    process::ExitCode,
    sync::{Arc, Mutex},
    thread::{self, ThreadId},
};
use tch::{Device, Kind, Tensor};
use ulysses::{
    DeviceChoice, HeadPartition, Kernel, Mask, Options, Score, Structure, UlyssesAttention,
    autograd::{Function, apply},
    communicator::collectives,
    core_attention, cuda_devices,
    device::{self, Event},
};
use world::{noise, on_ranks};

fn main() -> ExitCode {
    simulated_cuda::suite(&[
        (
            "ranks_get_the_devices_in_turn",
            ranks_get_the_devices_in_turn,
        ),
        (
            "attention_over_ranks_is_dense_attention",
            attention_over_ranks_is_dense_attention,
        ),
        (
            "a_rank_keeps_its_backward_to_itself",
            a_rank_keeps_its_backward_to_itself,
        ),
        (
            "ranks_add_up_what_is_on_their_devices",
            ranks_add_up_what_is_on_their_devices,
        ),
        ("every_kernel_there_is_agrees", every_kernel_there_is_agrees),
        ("a_device_tells_of_its_memory", a_device_tells_of_its_memory),
        ("events_come_in_order", events_come_in_order),
    ])
}

fn ranks_get_the_devices_in_turn() {
    let count = cuda_devices().unwrap();
    for rank in 0..2 * count {
        let device = DeviceChoice::Cuda.device(rank).unwrap();
        assert_eq!(device, Device::Cuda(rank % count));
    }
    assert_eq!(DeviceChoice::CudaAt(0).device(3).unwrap(), Device::Cuda(0));
    let missing = DeviceChoice::CudaAt(count).device(0).unwrap_err();
    let said = format!("no device cuda:{count}: this process sees {count}, from cuda:0 on");
    assert_eq!(missing.to_string(), said);
}

const HEADS: (usize, usize) = (8, 2);
const CAUSAL: Score = Score {
    mask: Mask::Causal,
    window: None,
    scale: None,
    softcap: None,
};

/// Query, key, value and cotangent, [1, 64, H, 32].
fn inputs(kind: Kind) -> [Tensor; 4] {
    let heads = [HEADS.0, HEADS.1, HEADS.1, HEADS.0].map(|heads| heads as i64);
    [0, 1, 2, 3].map(|i| noise(i as u64, [1, 64, heads[i], 32], kind))
}

/// Output and gradients of what `attend` makes of queries, keys and values.
fn answer(
    inputs: &[Tensor; 4],
    attend: impl FnOnce([&Tensor; 3]) -> ulysses::Result<Tensor>,
) -> ulysses::Result<[Tensor; 4]> {
    let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(true);
    let [q, k, v] = [0, 1, 2].map(|i| leaf(&inputs[i]));
    let out = attend([&q, &k, &v])?;
    (&out * &inputs[3]).sum(out.kind()).f_backward()?;
    Ok([out.detach(), q.grad(), k.grad(), v.grad()])
}

fn dense(inputs: &[Tensor; 4], kernel: Kernel) -> ulysses::Result<[Tensor; 4]> {
    let heads = HeadPartition::new(HEADS.0, HEADS.1, 1)?.head_map(0);
    answer(inputs, |tensors| {
        let [q, k, v] = tensors.map(|tensor| tensor.transpose(1, 2));
        let none = Structure::default();
        Ok(core_attention(&q, &k, &v, &heads, kernel, &CAUSAL, &none)?.transpose(1, 2))
    })
}

/// The largest difference, relative to the largest number.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let [a, b] = [a, b].map(|tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double));
    let largest = b.abs().max().double_value(&[]);
    (a - b).abs().max().double_value(&[]) / largest
}

/// A few roundings of numbers of this size.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-13,
        Kind::Float => 1e-5,
        Kind::Half => 1e-2,
        _ => 5e-2,
    }
}

fn attention_over_ranks_is_dense_attention() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half] {
        let right = {
            let device = DeviceChoice::Cuda.device(0).unwrap();
            dense(
                &inputs(kind).map(|tensor| tensor.to_device(device)),
                Kernel::Math,
            )
            .unwrap()
        };
        for ranks in [1, 2, 4] {
            let answers = on_ranks(ranks, |communicator| {
                let rank = communicator.rank();
                let device = DeviceChoice::Cuda.device(rank).unwrap();
                let own = 64 / ranks as i64;
                let shard = |tensor: Tensor| tensor.narrow(1, rank as i64 * own, own);
                let shards = inputs(kind).map(|tensor| shard(tensor).to_device(device));
                let options = Options {
                    score: CAUSAL,
                    ..Options::default()
                };
                let attention = UlyssesAttention::new(communicator, options);
                let answer = answer(&shards, |[q, k, v]| attention.forward(q, k, v)).unwrap();
                assert!(answer.iter().all(|tensor| tensor.device() == device));
                answer.map(|tensor| tensor.to_device(Device::Cpu))
            });
            for (i, right) in right.iter().enumerate() {
                let whole: Vec<_> = answers.iter().map(|answer| &answer[i]).collect();
                let off = difference(&Tensor::cat(&whole, 1), right);
                assert!(
                    off <= tolerance(kind),
                    "{kind:?}, {ranks} ranks, tensor {i}: {off}"
                );
            }
        }
    }
}

/// Tells on which thread its backward runs.
struct Where(Arc<Mutex<Option<ThreadId>>>);

impl Function for Where {
    fn forward(&mut self, inputs: &[Tensor]) -> ulysses::Result<Vec<Tensor>> {
        Ok(vec![inputs[0].f_mul_scalar(2.0)?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> ulysses::Result<Vec<Option<Tensor>>> {
        *self.0.lock().unwrap() = Some(thread::current().id());
        Ok(vec![Some(cotangents[0].f_mul_scalar(2.0)?)])
    }
}

/// The thread of a backward that this thread begins on a device.
fn thread_of_backward() -> ThreadId {
    let place = Arc::default();
    let leaf = Tensor::ones([2], (Kind::Float, Device::Cuda(0))).set_requires_grad(true);
    let out = apply(Where(Arc::clone(&place)), &[&leaf]).unwrap();
    out[0].sum(Kind::Float).backward();
    let thread = *place.lock().unwrap();
    thread.unwrap()
}

fn a_rank_keeps_its_backward_to_itself() {
    // It would not by itself: torch has a thread for the device.
    let elsewhere = thread::spawn(|| (thread_of_backward(), thread::current().id()));
    let (of_backward, own) = elsewhere.join().unwrap();
    assert_ne!(of_backward, own);
    on_ranks(2, |communicator| {
        let nothing = [Vec::new(), Vec::new()];
        communicator.all_to_all(&nothing, &nothing).unwrap();
        assert_eq!(thread_of_backward(), thread::current().id());
    });
}

fn ranks_add_up_what_is_on_their_devices() {
    let sums = on_ranks(3, |communicator| {
        let rank = communicator.rank();
        let device = DeviceChoice::Cuda.device(rank).unwrap();
        let own = Tensor::arange(5, (Kind::Float, device)) * (rank + 1) as f64;
        let sum = collectives::all_reduce(&*communicator, &own).unwrap();
        assert_eq!(sum.device(), device);
        Vec::<f32>::try_from(sum.to_device(Device::Cpu)).unwrap()
    });
    assert_eq!(sums, vec![[0.0, 6.0, 12.0, 18.0, 24.0]; 3]);
}

fn every_kernel_there_is_agrees() {
    let device = DeviceChoice::Cuda.device(0).unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        // One KV head for each query head: not every kernel takes groups.
        let [q, k, v, dout] = inputs(kind).map(|tensor| tensor.to_device(device));
        let repeated = |kv: Tensor| kv.repeat_interleave_self_int(4, 2, None);
        let inputs = [q, repeated(k), repeated(v), dout];
        let heads = HeadPartition::new(HEADS.0, HEADS.0, 1).unwrap().head_map(0);
        let by = |kernel| {
            answer(&inputs, |tensors| {
                let [q, k, v] = tensors.map(|tensor| tensor.transpose(1, 2));
                let none = Structure::default();
                Ok(core_attention(&q, &k, &v, &heads, kernel, &CAUSAL, &none)?.transpose(1, 2))
            })
        };
        let right = by(Kernel::Math).unwrap();
        for kernel in Kernel::ALL {
            // What is not on this device says so, and is nothing to compare.
            let Ok(answer) = by(kernel) else {
                assert!(!matches!(kernel, Kernel::Sdpa | Kernel::Eager));
                continue;
            };
            for (answer, right) in answer.iter().zip(&right) {
                let off = difference(answer, right);
                assert!(off <= tolerance(kind), "{kernel:?} in {kind:?}: {off}");
            }
        }
    }
}

fn a_device_tells_of_its_memory() {
    let device = DeviceChoice::Cuda.device(0).unwrap();
    let (free, total) = device::memory(device).unwrap().unwrap();
    assert!(0 < free && free <= total);
    assert_eq!(device::memory(Device::Cpu).unwrap(), None);
}

fn events_come_in_order() {
    let device = DeviceChoice::Cuda.device(0).unwrap();
    device::set_current(device).unwrap();
    let matrix = Tensor::ones([512, 512], (Kind::Float, device));
    let before = Event::record(device).unwrap();
    let product = matrix.matmul(&matrix);
    let after = Event::record(device).unwrap();
    after.wait().unwrap();
    assert!(before.is_reached().unwrap() && after.is_reached().unwrap());
    assert!(before.seconds_until(&after).unwrap() >= 0.0);
    assert_eq!(product.double_value(&[3, 4]), 512.0);
    let of_host = Event::record(Device::Cpu).unwrap();
    assert!(of_host.seconds_until(&after).is_err());
}
