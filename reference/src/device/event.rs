//! When a device has come to a point of its stream.

use super::ffi;
use crate::error::Result;
use std::time::Instant;
use tch::{Device, TchError};

/// A point in what a thread has given a device to do.
///
/// A CPU has come to it at once.
pub struct Event(Point);

enum Point {
    Host(Instant),
    Device(ffi::Event),
}

impl Event {
    /// The point after all that this thread has given `device` so far.
    ///
    /// # Errors
    /// When CUDA refuses.
    pub fn record(device: Device) -> Result<Event> {
        Ok(Event(match device {
            Device::Cuda(index) => Point::Device(ffi::Event::record(index as i32)?),
            _ => Point::Host(Instant::now()),
        }))
    }

    /// Whether the device has come to it.
    ///
    /// # Errors
    /// When something before it failed on the device.
    pub fn is_reached(&self) -> Result<bool> {
        match &self.0 {
            Point::Host(_) => Ok(true),
            Point::Device(event) => Ok(event.query()?),
        }
    }

    /// Waits until the device has come to it.
    ///
    /// # Errors
    /// As for [`Event::is_reached`].
    pub fn wait(&self) -> Result<()> {
        match &self.0 {
            Point::Host(_) => Ok(()),
            Point::Device(event) => Ok(event.synchronize()?),
        }
    }

    /// Seconds from here to `later` by the device's own clock. Both have been
    /// waited for, and are of one device.
    ///
    /// # Errors
    /// When they are of different devices, or not reached.
    pub fn seconds_until(&self, later: &Event) -> Result<f64> {
        match (&self.0, &later.0) {
            (Point::Host(from), Point::Host(to)) => {
                Ok(to.saturating_duration_since(*from).as_secs_f64())
            }
            (Point::Device(from), Point::Device(to)) => Ok(from.milliseconds_until(to)? / 1000.0),
            _ => Err(TchError::Torch("two events of different devices".to_owned()).into()),
        }
    }
}
