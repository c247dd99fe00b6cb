//! Faults of what one call leaves behind for the next.

use fixtures::{Array, State};

use super::{Fault, Made};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "gradients-kept",
        mistake: Mistake::StateKept,
        effect: "Gradients are those of this step and of the one before.",
        source: None,
        made: Made::InAttention {
            applies: |case| case.world > 1 && case.extras.state.is_some(),
            make: |stages| {
                stages.answered = |at, answer| {
                    let last = at.memory.borrow_mut().last.replace(answer.clone());
                    for (name, before) in last.into_iter().flatten() {
                        let Some(now) = answer.get_mut(&name) else {
                            continue;
                        };
                        if name != "out" && now.shape == before.shape {
                            let sums = now.to_f64().into_iter().zip(before.to_f64());
                            let sums: Vec<f64> = sums.map(|(now, before)| now + before).collect();
                            *now = Array::from_f64(now.dtype, &now.shape, &sums);
                        }
                    }
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "kv-groups-kept",
        mistake: Mistake::StateKept,
        effect: "Evaluation after training fails where KV heads were replicated.",
        source: Some("DeepSpeed 0.19.8, ulysses_sp.py line 317"),
        made: Made::InAttention {
            applies: |case| {
                let is_evaluated = case.extras.state == Some(State::EvalBetween);
                is_evaluated && case.world > case.kv_heads
            },
            make: |stages| {
                stages.local = |at, _, local| {
                    let (heads, kv_heads) = (local.kv_of_query.len(), local.key.size()[1] as usize);
                    let group = heads / kv_heads;
                    let group = *at.memory.borrow_mut().first.get_or_insert(group);
                    local.kv_of_query = (0..heads).map(|head| (head / group) as i64).collect();
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "stays-in-evaluation",
        mistake: Mistake::StateKept,
        effect: "After an evaluation nothing is exchanged any more.",
        source: None,
        made: Made::InAttention {
            applies: |case| case.world > 1 && case.extras.state == Some(State::EvalBetween),
            make: |stages| {
                stages.asked = |at, asked| {
                    let mut memory = at.memory.borrow_mut();
                    if asked.is_alone {
                        memory.first = Some(1);
                    }
                    asked.is_alone = memory.first.is_some();
                    Ok(())
                };
            },
        },
    },
];
