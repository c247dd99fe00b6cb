//! Which clauses a case of the profile `loss` tests.

use fixtures::LossCase;
use fixtures::loss::Ignored;

use super::Clause;

pub(super) fn clauses(case: &LossCase) -> Vec<Clause> {
    if case.defect.is_some() {
        let refusal = [Clause::SenseIsChecked, Clause::InWords];
        let together = (case.world > 1).then_some(Clause::Together);
        return refusal.into_iter().chain(together).collect();
    }
    let tests = [
        (case.ignored != Ignored::All, Clause::OneLoss),
        (
            matches!(case.ignored, Ignored::Some | Ignored::Rank) && case.world > 1,
            Clause::LossOfUnevenCounts,
        ),
        (case.ignored == Ignored::All, Clause::NothingToLearn),
        (case.ignored != Ignored::All, Clause::LossGradient),
        (
            case.hidden.is_some() && case.ignored != Ignored::All,
            Clause::LossParameters,
        ),
        (case.is_large, Clause::LossOverflows),
    ];
    let tested = tests.into_iter();
    tested
        .filter_map(|(tests, clause)| tests.then_some(clause))
        .collect()
}
