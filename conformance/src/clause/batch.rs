//! Which clauses a case of the profile `batch` tests.

use fixtures::BatchCase;

use super::Clause;

pub(super) fn clauses(case: &BatchCase) -> Vec<Clause> {
    let are_many = case.world > 1;
    if case.defect.is_some() {
        let refusal = [Clause::SenseIsChecked, Clause::InWords];
        let together = are_many.then_some(Clause::Together);
        return refusal.into_iter().chain(together).collect();
    }
    let epochs = case.stream.map_or(0, |stream| stream.epochs);
    let tests = [
        (are_many, Clause::PositionsBeforeCut),
        (case.documents.is_some(), Clause::PositionsOfDocuments),
        // One token alone has no next one.
        (case.sequence > 1, Clause::TargetsBeforeCut),
        (!case.is_across, Clause::TargetsOfDocuments),
        (case.pad.is_some(), Clause::FilledRows),
        (are_many, Clause::EveryEntryCut),
        (case.stream.is_some(), Clause::EveryBatchServed),
        (case.stream.is_some() && are_many, Clause::OneBatchAtATime),
        (epochs > 1, Clause::EveryEpoch),
    ];
    let tested = tests.into_iter();
    tested
        .filter_map(|(tests, clause)| tests.then_some(clause))
        .collect()
}
