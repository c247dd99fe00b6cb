//! An implementation in process that is right, but where a test spoils it.
// Not every test uses all of it.
#![allow(dead_code)]

use fixtures::exchange::{AnswerStatus, CaseInfo, Tensors};
use fixtures::{AttentionCase, Case, Feature};
use ulysses_conformance::implementation::{
    Claims, Collapse, Failure, Implementation, Interrupt, RankAnswer,
};
use ulysses_conformance::known::KnownFailures;
use ulysses_conformance::runner::{Summary, run};

use crate::answers::{attention, ok, right, said, shards};

/// How it goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// The first number of the output is off by 1.
    Output,
    /// The first number of the gradient of the queries is off by 1.
    QueryGradient,
    /// Every rank raises an error.
    Error,
    /// Rank 0 ends.
    Crash,
}

/// Goes wrong in the cases in which `how` says so.
pub(crate) struct Spoiled {
    pub(crate) unclaimed: Vec<Feature>,
    pub(crate) how: fn(&AttentionCase) -> Option<How>,
    pub(crate) asked: Vec<AttentionCase>,
}

impl Spoiled {
    pub(crate) fn new(how: fn(&AttentionCase) -> Option<How>) -> Spoiled {
        Spoiled {
            unclaimed: Vec::new(),
            how,
            asked: Vec::new(),
        }
    }
}

impl Implementation for Spoiled {
    fn name(&self) -> &str {
        "spoiled"
    }

    fn claims(&mut self, _world: usize) -> Result<Claims, Failure> {
        let claimed = Feature::ALL
            .into_iter()
            .filter(|feature| !self.unclaimed.contains(feature));
        Ok(Claims {
            features: claimed.map(|feature| feature.name().to_owned()).collect(),
            ..Claims::default()
        })
    }

    fn ask(&mut self, posed: Vec<(CaseInfo, Tensors)>) -> Result<Vec<RankAnswer>, Failure> {
        let case = attention(&posed);
        self.asked.push(case.clone());
        let mut answer = right(&case);
        match (self.how)(&case) {
            None => {}
            Some(How::Output) => answer.out[0] += 1.0,
            Some(How::QueryGradient) => answer.dq[0] += 1.0,
            Some(How::Error) => return Ok(vec![said(AnswerStatus::Error, "boom"); case.world]),
            Some(How::Crash) => {
                return Err(Failure::Crashed(Collapse {
                    sentence: format!("a process ended: rank 0 (case {})", self.asked.len()),
                    logs: vec!["launcher stderr: killed".to_owned()],
                    is_of_ranks: true,
                }));
            }
        }
        Ok(ok(shards(&case, &answer)))
    }
}

/// Has it asked these cases.
pub(crate) fn summary(spoiled: &mut Spoiled, names: &[&str], known: &mut KnownFailures) -> Summary {
    let cases: Vec<Case> = names.iter().map(|name| name.parse().unwrap()).collect();
    run(spoiled, &cases, known, &Interrupt::default(), &mut |_| {})
}
