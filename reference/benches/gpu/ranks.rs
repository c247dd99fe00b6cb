//! The one way in which time is taken here: events of the device around some
//! turns of the work, of which each rank does its part.

use std::{sync::Arc, thread};
use tch::Device;
use ulysses::{Communicator, ThreadCommunicator, device};

/// In one repetition, so that the ranks' two meetings around them count little.
const TURNS: usize = 5;
/// Before the first repetition: torch's allocator gets its memory, libraries
/// choose their kernels.
const WARM_UP: usize = 3;

/// Seconds of one turn of `work`, for each repetition; the slowest rank counts.
///
/// Every rank begins its clock before any of them works and stops it after all
/// have given the device their work. So ranks that share a GPU and its stream
/// each see the time of all.
pub(crate) fn seconds(
    communicator: &dyn Communicator,
    device: Device,
    repetitions: usize,
    mut work: impl FnMut(),
) -> Vec<f64> {
    for _ in 0..WARM_UP {
        work();
    }
    let once = |_| {
        device::synchronize(device).unwrap();
        meet(communicator, 0.0);
        let begun = device::Event::record(device).unwrap();
        meet(communicator, 0.0);
        for _ in 0..TURNS {
            work();
        }
        meet(communicator, 0.0);
        let ended = device::Event::record(device).unwrap();
        ended.wait().unwrap();
        let own = begun.seconds_until(&ended).unwrap() / TURNS as f64;
        meet(communicator, own).into_iter().fold(0.0, f64::max)
    };
    (0..repetitions).map(once).collect()
}

/// What every rank brings.
fn meet(communicator: &dyn Communicator, brought: f64) -> Vec<f64> {
    // Times are positive, and their bits fit.
    let all = communicator.all_gather(&[brought.to_bits() as i64]);
    let of_rank = |words: Vec<i64>| f64::from_bits(words[0] as u64);
    all.unwrap().into_iter().map(of_rank).collect()
}

/// The same of `ranks` threads that share `device`. `prepare` gives the work of
/// a rank; what it does is not timed.
pub(crate) fn seconds_of_threads<W: FnMut()>(
    ranks: usize,
    device: Device,
    repetitions: usize,
    prepare: impl Fn(Arc<dyn Communicator>) -> W + Sync,
) -> Vec<f64> {
    let prepare = &prepare;
    let run = move |end: ThreadCommunicator| {
        tch::set_num_threads(1);
        device::set_current(device).unwrap();
        let end: Arc<dyn Communicator> = Arc::new(end);
        seconds(&*end, device, repetitions, prepare(Arc::clone(&end)))
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = ThreadCommunicator::world(ranks)
            .into_iter()
            .map(|end| scope.spawn(move || run(end)))
            .collect();
        // All have the same.
        let seconds = ranks.into_iter().map(|rank| rank.join().unwrap());
        seconds.last().unwrap_or_default()
    })
}
