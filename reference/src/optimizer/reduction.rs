//! From every rank's gradient to its sum, at its owners.
//!
//! In stage two a gradient goes to its owners while backward still runs, and is
//! freed. The signals that gradients are complete may come in another order on
//! another rank, or not at all, and backward has collectives of its own: a rank
//! that waited in a signal for its peers could be the one that a peer waits for
//! in an exchange of attention. So a signal only hands the gradient over, to a
//! thread with groups of its own. That thread sums parameters in one order, the
//! last first, whenever the next in turn is there, and backward never waits.
//! What did not come by the end of backward has no gradient on this rank.

use super::partition::Partition;
use crate::{
    autograd::{HookHandle, on_gradient_ready, take_gradient},
    communicator::{Communicator, CommunicatorError, collectives},
    error::{Error, Result, refuse},
};
use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};
use tch::{Kind, Tensor};

/// The groups of a sum, and what is summed.
#[derive(Clone)]
pub(super) struct Reduction {
    /// The owners of one copy.
    pub(super) sharding: Arc<dyn Communicator>,
    /// The owners of the same part.
    pub(super) replicate: Arc<dyn Communicator>,
    pub(super) partition: Arc<Partition>,
    /// Elements and dtypes of the parameters.
    pub(super) shapes: Arc<Vec<(i64, Kind)>>,
}

impl Reduction {
    /// This rank's part of the sum over all ranks, the same bits at all of its
    /// owners; `None` where no rank has a gradient. One that has none counts as
    /// zeros beside one that has.
    pub(super) fn sum(&self, index: usize, gradient: Option<Tensor>) -> Result<Option<Tensor>> {
        let any = |group: &Arc<dyn Communicator>, own: bool| -> Result<bool> {
            Ok(group.all_gather(&[own.into()])?.concat().contains(&1))
        };
        let here = any(&self.sharding, gradient.is_some())?;
        if !any(&self.replicate, here)? {
            return Ok(None);
        }
        let flat = match (gradient, self.shapes.get(index)) {
            (Some(gradient), _) => gradient.f_reshape([-1])?,
            (None, Some(&(elements, kind))) => {
                Tensor::f_zeros([elements], (kind, tch::Device::Cpu))?
            }
            (None, None) => return Ok(None),
        };
        let counts = self.partition.counts(index);
        let part = collectives::reduce_scatter(&*self.sharding, &flat, counts)?;
        Ok(Some(collectives::all_reduce(&*self.replicate, &part)?))
    }

    /// The same with groups of its own. All ranks call it together.
    fn apart(&self) -> Result<Reduction> {
        Ok(Reduction {
            sharding: self.sharding.split(0)?,
            replicate: self.replicate.split(0)?,
            ..self.clone()
        })
    }

    fn abandon(&self, reason: &str) {
        self.sharding.abandon(reason);
        self.replicate.abandon(reason);
    }
}

/// The thread that sums gradients as they become complete.
pub(super) struct Reducer {
    orders: Sender<Order>,
    groups: Reduction,
    /// Removed before the thread is told to end.
    _hooks: Vec<HookHandle>,
}

enum Order {
    Gradient(usize, Result<Option<Tensor>>),
    EndOfBackward(Sender<Result<Vec<Option<Tensor>>>>),
}

impl Reducer {
    /// Begins to take every gradient of `parameters` as it becomes complete.
    pub(super) fn start(reduction: &Reduction, parameters: &[Tensor]) -> Result<Reducer> {
        let groups = reduction.apart()?;
        let (orders, inbox) = channel();
        let hooks = parameters
            .iter()
            .enumerate()
            .map(|(index, parameter)| {
                let orders = orders.clone();
                on_gradient_ready(parameter, move |parameter| {
                    // Without a thread to take it, the end of backward says so.
                    let _ = orders.send(Order::Gradient(index, take_gradient(parameter)));
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let worker = Worker::new(groups.clone(), parameters.len());
        thread::Builder::new()
            .name("sums of gradients".to_owned())
            .spawn(move || worker.run(&inbox))
            .map_err(|error| gone(&error.to_string()))?;
        Ok(Reducer {
            orders,
            groups,
            _hooks: hooks,
        })
    }

    /// This rank's parts of the sums of one backward. All ranks call it together.
    pub(super) fn end_of_backward(&self) -> Result<Vec<Option<Tensor>>> {
        let (answer, answered) = channel();
        let ended = || gone("the thread that sums gradients has ended");
        self.orders
            .send(Order::EndOfBackward(answer))
            .map_err(|_| ended())?;
        // It waits for peers only as long as its communicators do.
        answered.recv().map_err(|_| ended())?
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        self.groups.abandon("its optimizer was dropped");
    }
}

fn gone(reason: &str) -> Error {
    CommunicatorError::Unusable {
        operation: "the sum of gradients",
        reason: reason.to_owned(),
    }
    .into()
}

/// The state of the thread.
struct Worker {
    reduction: Reduction,
    /// Gradients whose turn has not come.
    waiting: Vec<Option<Tensor>>,
    parts: Vec<Option<Tensor>>,
    /// Parameters whose turn is to come; the last of them is the next.
    left: usize,
    /// The first failure, which is every answer from then on.
    failure: Option<Error>,
}

impl Worker {
    fn new(reduction: Reduction, parameters: usize) -> Worker {
        let none = || (0..parameters).map(|_| None).collect();
        Worker {
            reduction,
            waiting: none(),
            parts: none(),
            left: parameters,
            failure: None,
        }
    }

    fn run(mut self, inbox: &Receiver<Order>) {
        let _guard = tch::no_grad_guard();
        while let Ok(order) = inbox.recv() {
            match order {
                Order::Gradient(index, gradient) => {
                    self.attempt(|worker| worker.take(index, gradient?));
                }
                Order::EndOfBackward(answer) => {
                    self.attempt(Worker::finish);
                    let result = match &self.failure {
                        None => Ok(self.parts.iter_mut().map(Option::take).collect()),
                        Some(failure) => Err(failure.clone()),
                    };
                    // Who asked may be gone: then nobody wants the answer.
                    let _ = answer.send(result);
                }
            }
        }
    }

    /// Does something, unless the ranks have lost step already.
    fn attempt(&mut self, action: impl FnOnce(&mut Worker) -> Result<()>) {
        if self.failure.is_some() {
            return;
        }
        if let Err(failure) = action(self) {
            self.reduction.abandon(&failure.to_string());
            self.failure = Some(failure);
        }
    }

    /// Keeps a gradient until its turn, and sums all whose turn has come.
    fn take(&mut self, index: usize, gradient: Option<Tensor>) -> Result<()> {
        if index >= self.left || self.waiting[index].is_some() {
            return refuse(
                "parameters",
                format!("has a second gradient at position {index}"),
                "call `end_of_backward` after each backward that no `step` follows",
            );
        }
        self.waiting[index] = gradient;
        while self.left > 0 && self.waiting[self.left - 1].is_some() {
            self.sum_next()?;
        }
        Ok(())
    }

    /// Sums all that are left: what has not come has no gradient here.
    fn finish(&mut self) -> Result<()> {
        while self.left > 0 {
            self.sum_next()?;
        }
        self.left = self.waiting.len();
        Ok(())
    }

    fn sum_next(&mut self) -> Result<()> {
        self.left -= 1;
        let gradient = self.waiting[self.left].take();
        self.parts[self.left] = self.reduction.sum(self.left, gradient)?;
        Ok(())
    }
}
