//! Which clauses a case of the profile `mesh` tests.

use fixtures::MeshCase;

use super::Clause;

pub(super) fn clauses(case: &MeshCase) -> Vec<Clause> {
    if case.defect.is_some() {
        let refusal = [Clause::SenseIsChecked, Clause::InWords];
        let together = (case.world > 1).then_some(Clause::Together);
        return refusal.into_iter().chain(together).collect();
    }
    let tests = [
        (true, Clause::Coordinates),
        (case.sp > 1, Clause::SequenceNeighbours),
        (
            case.dp_replicate > 1 || case.dp_shard > 1,
            Clause::DataParallelGroups,
        ),
        (case.sp > 1, Clause::StateOverSequence),
        (case.has_sums, Clause::SumsOfGroups),
        (case.has_mpu, Clause::MpuAnswers),
    ];
    let tested = tests.into_iter();
    tested
        .filter_map(|(tests, clause)| tests.then_some(clause))
        .collect()
}
