//! A rank's ends of the groups that it split off, as long as somebody has them.

use super::Communicator;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub(super) struct Groups<C>(Mutex<Vec<Weak<C>>>);

impl<C: Communicator> Groups<C> {
    pub(super) fn new() -> Groups<C> {
        Groups(Mutex::default())
    }

    pub(super) fn add(&self, end: &Arc<C>) {
        let mut ends = self.lock();
        ends.retain(|end| end.strong_count() > 0);
        ends.push(Arc::downgrade(end));
    }

    /// Abandons each, and so the groups that were split off from them.
    pub(super) fn abandon(&self, reason: &str) {
        for end in self.lock().iter().filter_map(Weak::upgrade) {
            end.abandon(reason);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<C>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
