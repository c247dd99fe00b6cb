//! A communicator that says which collective its rank is in, for the judge to
//! tell of when ranks hang or die.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fixtures::exchange::{ANSWERING, Session};
use tch::Tensor;
use ulysses::{Communicator, CommunicatorError};

/// Passes everything on to `inner`, and says in the session what it enters and
/// what it has left.
pub struct TellingCommunicator {
    inner: Arc<dyn Communicator>,
    session: Session,
    /// The rank as the session knows it, in groups too.
    rank: usize,
    case: Arc<AtomicUsize>,
    /// Collectives of this case, those of groups among them.
    entered: Arc<AtomicUsize>,
}

impl TellingCommunicator {
    /// Tells of `inner` in `session`.
    pub fn new(inner: Arc<dyn Communicator>, session: Session) -> TellingCommunicator {
        TellingCommunicator {
            rank: inner.rank(),
            inner,
            session,
            case: Arc::default(),
            entered: Arc::default(),
        }
    }

    /// What follows belongs to the case of this number in the session.
    pub fn begin(&self, case: usize) {
        self.case.store(case, Ordering::Relaxed);
        self.entered.store(0, Ordering::Relaxed);
    }

    fn run<T>(&self, collective: &str, run: impl FnOnce() -> T) -> T {
        let case = self.case.load(Ordering::Relaxed);
        let number = self.entered.fetch_add(1, Ordering::Relaxed) + 1;
        let say = |place: &str| {
            let line = format!("case {case}: {ANSWERING}, {place} {collective} #{number}");
            // A rank that cannot say where it is may still be right.
            let _ = self.session.say_progress(self.rank, &line);
        };
        say("in");
        let result = run();
        say("after");
        result
    }
}

impl Communicator for TellingCommunicator {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_gather(&self, words: &[i64]) -> Result<Vec<Vec<i64>>, CommunicatorError> {
        self.run("all_gather", || self.inner.all_gather(words))
    }

    fn all_to_all(
        &self,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError> {
        self.run("all_to_all", || self.inner.all_to_all(send, receive))
    }

    fn split(&self, color: usize) -> Result<Arc<dyn Communicator>, CommunicatorError> {
        Ok(Arc::new(TellingCommunicator {
            inner: self.run("split", || self.inner.split(color))?,
            session: self.session.clone(),
            rank: self.rank,
            case: Arc::clone(&self.case),
            entered: Arc::clone(&self.entered),
        }))
    }

    fn abandon(&self, reason: &str) {
        self.inner.abandon(reason);
    }
}
