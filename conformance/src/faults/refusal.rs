//! Faults of what is refused, and how.

use fixtures::Defect;
use ulysses::SequenceLength;

use super::checks::refuse;
use super::rank::Documents;
use super::{Fault, Made, is_split};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "bad-input-taken",
        mistake: Mistake::BadInputTaken,
        effect: "Something is computed of input that makes no sense, and nobody learns of it.",
        source: Some("DeepSpeed 0.19.8, DistributedAttention: sizes go unchecked"),
        made: Made::InAttention {
            applies: |case| {
                let taken = [
                    Defect::Ends,
                    Defect::Window,
                    Defect::Length,
                    Defect::Softcap,
                ];
                let lengthened = [Defect::Slopes, Defect::Sinks, Defect::Norms];
                let defect = case.extras.defect;
                defect.is_some_and(|defect| taken.contains(&defect) || lengthened.contains(&defect))
            },
            make: |stages| {
                stages.asked = |at, asked| {
                    let options = &mut asked.options;
                    options.score.window = options.score.window.filter(|&window| window > 0);
                    options.score.softcap = options.score.softcap.map(f64::abs);
                    options.sequence_length = SequenceLength::Variable;
                    if let Some(Documents::Ends(ends)) = &mut asked.documents {
                        for end in ends.iter_mut().filter_map(|row| row.last_mut()) {
                            *end = at.info.sequence;
                        }
                    }
                    let heads = [asked.query.size()[2], asked.key.size()[2]];
                    for tensor in [&mut asked.slopes, &mut asked.sinks].into_iter().flatten() {
                        *tensor = tensor.f_narrow(0, 0, heads[0])?;
                    }
                    for (tensor, heads) in asked.norms.iter_mut().flatten().zip(heads) {
                        *tensor = tensor.f_narrow(0, 0, heads)?;
                    }
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "refused-without-words",
        mistake: Mistake::RefusedWithoutWords,
        effect: "An error says nothing.",
        source: None,
        made: Made::InAttention {
            applies: |case| case.extras.defect.is_some(),
            make: |stages| stages.asked = |_, _| refuse(""),
        },
    },
    Fault {
        name: "even-heads-refused",
        mistake: Mistake::GoodInputRefused,
        effect: "Head counts that the ranks divide are refused.",
        source: Some("DeepSpeed #6774, PR #6797"),
        // The check is applied to the heads that a rank has after the exchange.
        made: Made::InAttention {
            applies: |case| {
                let (heads, ranks) = (case.query_heads, case.world);
                let own = heads / ranks;
                is_split(case) && heads.is_multiple_of(ranks) && !own.is_multiple_of(ranks)
            },
            make: |stages| {
                stages.asked = |at, _| {
                    let (own, ranks) = (at.info.query_heads / at.world(), at.world());
                    match own.is_multiple_of(ranks) {
                        true => Ok(()),
                        false => refuse(format!("{own} heads are not divisible by {ranks} ranks")),
                    }
                };
            },
        },
    },
    Fault {
        name: "one-rank-refuses",
        mistake: Mistake::OneRankRefuses,
        effect: "One rank raises an error, and the others go on without it.",
        source: Some("LlamaFactory PR #10794"),
        made: Made::InAttention {
            applies: |case| is_split(case) && !case.sequence.is_multiple_of(case.world),
            make: |stages| {
                stages.answered = |at, _| {
                    let lengths = &at.info.shard_lengths;
                    match at.is_last() && lengths[at.rank()] != lengths[0] {
                        true => refuse("this rank has another number of tokens than the first"),
                        false => Ok(()),
                    }
                };
            },
        },
    },
];
