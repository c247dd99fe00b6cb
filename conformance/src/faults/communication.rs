//! Faults of who waits for whom, and of who sends.

use std::panic;

use super::rank::Halt;
use super::{Fault, Made, is_split};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "rank-stays-away",
        mistake: Mistake::RankStaysAway,
        effect: "All ranks but one wait for ever.",
        source: Some(
            "kernels-community #1081; DeepSpeed 0.19.8, DistributedAttention with 13 heads on 2 ranks",
        ),
        // A second for each case.
        made: Made::InAttention {
            applies: |case| is_split(case) && !case.sequence.is_multiple_of(case.world),
            make: |stages| {
                stages.attended = |at, output| match at.is_last() {
                    true => Err(Halt::Said("there is nothing to send".to_owned())),
                    false => Ok(output),
                };
            },
        },
    },
    Fault {
        name: "rank-dies",
        mistake: Mistake::RankDies,
        effect: "A rank ends, and with it the run.",
        source: Some("DeepSpeed 0.19.8 over gloo, with unequal numbers of tokens"),
        made: Made::InAttention {
            applies: |case| is_split(case) && !case.sequence.is_multiple_of(case.world),
            make: |stages| {
                stages.attended = |at, output| match at.is_last() {
                    // Without the words of a panic, which nobody is to read.
                    true => panic::resume_unwind(Box::new("aborted")),
                    false => Ok(output),
                };
            },
        },
    },
    Fault {
        name: "sends-in-eval",
        mistake: Mistake::SendsInEval,
        effect: "Evaluation is right, and waits for ranks that have other work.",
        source: Some("accelerate PR #3917; transformers PR #43517"),
        made: Made::InAttention {
            applies: |case| case.world > 1 && case.extras.eval,
            make: |stages| {
                stages.asked = |at, asked| {
                    let block = |_| vec![asked.query.shallow_clone()];
                    let send: Vec<_> = (0..at.world()).map(block).collect();
                    let room = |_| Ok::<_, Halt>(vec![asked.query.f_zeros_like()?]);
                    let receive = (0..at.world()).map(room).collect::<Result<Vec<_>, _>>()?;
                    at.communicator.all_to_all(&send, &receive)?;
                    Ok(())
                };
            },
        },
    },
];
