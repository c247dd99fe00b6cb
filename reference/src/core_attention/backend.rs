//! torch's attention with one of its kernels switched on alone.
//!
//! torch has switches for that, which are the whole process'. So calls pass a
//! gate: those that want the same switches go together, others wait until the
//! last of them has come out, who puts the switches back. The choice is made
//! in forward, and backward goes by what forward was: nobody waits there.

use crate::device;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What is switched on; `None` leaves the process' switches as they are.
pub(super) type Switches = Option<u8>;

pub(super) const FLASH: u8 = 1;
pub(super) const MEMORY_EFFICIENT: u8 = 2;
pub(super) const MATH: u8 = 4;
pub(super) const CUDNN: u8 = 8;

static GATE: Mutex<Gate> = Mutex::new(Gate {
    inside: 0,
    switches: None,
    before: 0,
});
static OPENED: Condvar = Condvar::new();

struct Gate {
    /// How many calls are inside, all with these switches.
    inside: usize,
    switches: Switches,
    /// How the process had them.
    before: u8,
}

/// Runs `call` with these switches.
pub(super) fn with<T>(switches: Switches, call: impl FnOnce() -> T) -> T {
    let _inside = Inside::enter(switches);
    call()
}

/// A call that is inside; it comes out when this is dropped, in a panic too.
struct Inside;

impl Inside {
    fn enter(switches: Switches) -> Inside {
        let mut gate = lock();
        while gate.inside > 0 && gate.switches != switches {
            gate = OPENED.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        if gate.inside == 0 {
            gate.switches = switches;
            if let Some(switches) = switches {
                gate.before = device::attention_switches();
                device::set_attention_switches(switches);
            }
        }
        gate.inside += 1;
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut gate = lock();
        gate.inside -= 1;
        if gate.inside == 0 {
            if gate.switches.is_some() {
                device::set_attention_switches(gate.before);
            }
            OPENED.notify_all();
        }
    }
}

fn lock() -> MutexGuard<'static, Gate> {
    // Nothing that holds the lock can leave the gate half changed.
    GATE.lock().unwrap_or_else(PoisonError::into_inner)
}
