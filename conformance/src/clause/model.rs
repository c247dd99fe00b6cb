//! Which clauses a case of the profile `model` tests.

use fixtures::ModelCase;
use fixtures::loss::Ignored;

use super::Clause;

pub(super) fn clauses(case: &ModelCase) -> Vec<Clause> {
    if case.defect.is_some() {
        let refusal = [Clause::SenseIsChecked, Clause::InWords];
        let together = (case.world > 1).then_some(Clause::Together);
        return refusal.into_iter().chain(together).collect();
    }
    let has_labels = case.ignored != Ignored::All;
    let are_many = case.sharing() > 1;
    let tests = [
        (true, Clause::ModelLogits),
        (has_labels, Clause::ModelLoss),
        (has_labels && are_many, Clause::ModelLabels),
        (case.documents.is_some(), Clause::ModelDocuments),
        (has_labels, Clause::WeightGradients),
        (case.is_tied && has_labels, Clause::TiedHead),
        (
            case.is_checkpointed && has_labels && are_many,
            Clause::LayersRunAgain,
        ),
        (case.replicas() > 1 && has_labels, Clause::ReplicaLoss),
    ];
    let tested = tests.into_iter();
    tested
        .filter_map(|(tests, clause)| tests.then_some(clause))
        .collect()
}
