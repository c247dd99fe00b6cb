//! What every communicator must do, whatever carries its bytes.
// Each test program uses its own part of this.
#![allow(dead_code)]

use crate::world::{Inputs, gradients, leaf, shard, uneven_shards};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use ulysses::{Communicator, Mask, Options, Score, UlyssesAttention};

const KINDS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half];

/// What rank `from` sends to rank `to`: `length` numbers that say so.
fn block(from: usize, to: usize, length: usize, kind: Kind) -> Tensor {
    let first = (100 * from + 10 * to) as i64;
    Tensor::arange_start(first, first + length as i64, (kind, Device::Cpu))
}

/// Exchanges of two blocks for each peer, one of them strided.
pub(crate) fn exchange(communicator: &dyn Communicator, length: fn(usize, usize) -> usize) {
    let (rank, size) = (communicator.rank(), communicator.size());
    for kind in KINDS {
        let send: Vec<_> = (0..size)
            .map(|peer| {
                let plain = block(rank, peer, length(rank, peer), kind);
                let pairs = Tensor::stack(&[&plain, &(&plain + 1)], 1);
                vec![plain, pairs.select(1, 1)]
            })
            .collect();
        let receive: Vec<_> = (0..size)
            .map(|peer| {
                let length = length(peer, rank) as i64;
                let pairs = Tensor::full([length, 2], -1, (kind, Device::Cpu));
                vec![pairs.select(1, 0), pairs.select(1, 1)]
            })
            .collect();
        communicator.all_to_all(&send, &receive).unwrap();
        for (peer, got) in receive.iter().enumerate() {
            let due = block(peer, rank, length(peer, rank), kind);
            assert_eq!(got[0], due);
            assert_eq!(got[1], due + 1);
        }
    }
}

/// Gathers of words, of none too.
pub(crate) fn gather(communicator: &dyn Communicator) {
    let (rank, size) = (communicator.rank() as i64, communicator.size() as i64);
    let due: Vec<_> = (0..size).map(|rank| vec![rank, i64::MIN + rank]).collect();
    assert_eq!(
        communicator.all_gather(&[rank, i64::MIN + rank]).unwrap(),
        due
    );
    let nothing = communicator.all_gather(&[]).unwrap();
    assert_eq!((nothing.len() as i64, nothing.concat()), (size, vec![]));
}

/// Ulysses has the bits of dense attention, forward and backward.
pub(crate) fn attention(communicator: &Arc<dyn Communicator>) {
    let (rank, size) = (communicator.rank(), communicator.size());
    let shards = uneven_shards(13, size);
    for kind in KINDS {
        for (heads, mask) in [((4, 4), Mask::Causal), ((8, 4), Mask::Full)] {
            let global = Inputs::new(2, 13, heads, 16, kind);
            let inputs = [&global.query, &global.key, &global.value]
                .map(|tensor| leaf(&shard(tensor, &shards, rank)));
            let options = Options {
                score: Score {
                    mask,
                    ..Score::default()
                },
                uneven_heads: true,
                ..Options::default()
            };
            let attention = UlyssesAttention::new(Arc::clone(communicator), options);
            let output = attention
                .forward(&inputs[0], &inputs[1], &inputs[2])
                .unwrap();
            let cotangent = shard(&global.cotangent, &shards, rank);
            let got = gradients(&output, &cotangent, inputs);
            let due = global
                .dense(mask)
                .map(|tensor| shard(&tensor, &shards, rank));
            // Over three ranks the groups of 8 query heads are split, and
            // the cotangents of key and value are summed in another order.
            let exact = if size == 3 && heads.0 == 8 { 2 } else { 4 };
            assert_eq!(got[..exact], due[..exact], "{kind:?} {heads:?}");
        }
    }
}

/// Groups of every other rank, and groups of those.
pub(crate) fn groups(communicator: &dyn Communicator) {
    let (rank, size) = (communicator.rank(), communicator.size());
    let color = |rank: usize| [usize::MAX, 5][rank % 2];
    let group = communicator.split(color(rank)).unwrap();
    let due: Vec<_> = (0..size).filter(|&other| other % 2 == rank % 2).collect();
    assert_eq!(due[group.rank()], rank);
    // Each group does as much as it likes, and may be split again.
    for _ in 0..rank % 2 {
        group.all_gather(&[0]).unwrap();
    }
    let gathered = group.all_gather(&[rank as i64]).unwrap().concat();
    assert!(gathered.into_iter().eq(due.iter().map(|&rank| rank as i64)));
    exchange(&*group, |from, to| 2 * from + to);
    let alone = group.split(rank).unwrap();
    assert_eq!((alone.rank(), alone.size()), (0, 1));
    exchange(communicator, |from, to| from + to);
}
