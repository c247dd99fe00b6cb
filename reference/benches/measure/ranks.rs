//! The one way in which time is taken here: threads that each prepare, do the
//! work once to warm up, start together and do it some more times.

use std::{
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};
use ulysses::{Communicator, ThreadCommunicator};

/// How long `ranks` threads, each a rank of its own, take to do their work
/// `iterations` times. The slowest one counts.
///
/// `prepare` gives the work of a rank; what it does is not timed.
pub(crate) fn time_on_ranks<W: FnMut()>(
    ranks: usize,
    iterations: u64,
    prepare: impl Fn(Arc<dyn Communicator>) -> W + Sync,
) -> Duration {
    let (prepare, start) = (&prepare, &Barrier::new(ranks));
    let run = move |end: ThreadCommunicator| {
        tch::set_num_threads(1);
        let mut work = prepare(Arc::new(end));
        work();
        start.wait();
        let begun = Instant::now();
        for _ in 0..iterations {
            work();
        }
        begun.elapsed()
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = ThreadCommunicator::world(ranks)
            .into_iter()
            .map(|end| scope.spawn(move || run(end)))
            .collect();
        let times = ranks.into_iter().map(|rank| rank.join().unwrap());
        times.max().unwrap_or_default()
    })
}

/// How long one process with `threads` threads of libtorch takes.
pub(crate) fn time_alone<W: FnMut()>(
    threads: i32,
    iterations: u64,
    prepare: impl FnOnce() -> W + Send,
) -> Duration {
    // On a thread of its own, for libtorch keeps a number for each.
    let run = move || {
        tch::set_num_threads(threads);
        let mut work = prepare();
        work();
        let begun = Instant::now();
        for _ in 0..iterations {
            work();
        }
        begun.elapsed()
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap())
}
