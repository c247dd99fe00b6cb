//! Which clauses a case tests.

use std::collections::BTreeSet;

use fixtures::{
    AttentionCase, Case, Content, Cotangent, Extras, Feature, Mask, Padding, Sharding, State,
    Strides,
};

use super::{Clause, batch, loss, mesh, model, tiled};

impl Clause {
    /// The clauses that `case` is there to test, in their order.
    ///
    /// That output and gradients are those of dense attention, every case tests
    /// that has an answer; that they are so in its own sizes and on its own
    /// ranks, plain cases alone; all others name what they ask beyond that.
    pub fn of_case(case: &Case) -> Vec<Clause> {
        match case {
            Case::Attention(case) => Clause::of_attention(case),
            Case::Loss(case) => loss::clauses(case),
            Case::Tiled(case) => tiled::clauses(case),
            Case::Batch(case) => batch::clauses(case),
            Case::Mesh(case) => mesh::clauses(case),
            Case::Model(case) => model::clauses(case),
        }
    }

    fn of_attention(case: &AttentionCase) -> Vec<Clause> {
        let all = Clause::ALL.iter().copied();
        match case.extras.defect {
            Some(_) => all.filter(|clause| clause.is_of_refusal(case)).collect(),
            None => {
                let asked = Asked::of(case);
                all.filter(|clause| clause.is_of_answer(&asked)).collect()
            }
        }
    }

    /// Whether `case`, which makes no sense, tests the clause.
    fn is_of_refusal(self, case: &AttentionCase) -> bool {
        match self {
            Clause::SenseIsChecked | Clause::InWords => true,
            Clause::Together => case.world > 1,
            Clause::MadeForOneLength => case.extras.fixed,
            _ => false,
        }
    }

    /// Whether a case that has an answer tests the clause.
    fn is_of_answer(self, asked: &Asked<'_>) -> bool {
        let Asked { case, features } = asked;
        let extras = &case.extras;
        let has = |feature| features.contains(&feature);
        let is_any_of = |some: &[Feature]| some.iter().any(|feature| features.contains(feature));
        let is_plain = asked.is_plain();
        let is_causal = case.mask == Mask::Causal;
        let is_traced = is_plain && case.content == Content::Coded;
        // Outside training each rank is by itself.
        let are_many = case.world > 1 && !extras.eval;
        match self {
            Clause::OwnTokens | Clause::OwnHeads => are_many && is_traced,
            // Who sees all keys does not see their order.
            Clause::OneOrder => are_many && is_traced && is_causal,
            Clause::SequencesApart => is_plain && has(Feature::Batch),
            Clause::AnyStrides => extras.strides != Strides::Contiguous,
            Clause::AnySharding => are_many && extras.sharding != Sharding::Contiguous,
            Clause::ShapeAndType => is_plain || has(Feature::ValueHeadSize),

            Clause::KvHeadOfQueryHead | Clause::GroupIsSummed => {
                is_plain && has(Feature::GroupedKv)
            }
            Clause::KvHeadsAreCopied | Clause::CopiesAreSummed => {
                is_plain && is_any_of(&[Feature::KvReplication, Feature::UnevenKvHeads])
            }
            Clause::UnevenHeads => {
                is_plain && is_any_of(&[Feature::UnevenKvHeads, Feature::UnevenQueryHeads])
            }
            Clause::FewerHeadsThanRanks => has(Feature::FewerQueryHeadsThanRanks),
            Clause::HeadsOfAll => are_many && (asked.has_parameters() || has(Feature::BlockSparse)),

            Clause::DenseOutput | Clause::DenseGradients => true,
            Clause::Precision | Clause::ClaimsAreKept => is_plain,
            Clause::Causal => is_plain && is_causal,
            // One key alone has all the weight, whatever its score.
            Clause::Scale => (is_plain && case.sequence > 1) || has(Feature::Scale),
            Clause::Cross => has(Feature::CrossAttention),
            Clause::Window => has(Feature::SlidingWindow),
            Clause::Documents => extras.documents.is_some(),
            // Who sees no later key does not see padding behind the last token.
            Clause::Padding => {
                has(Feature::KeyPadding) && !(is_causal && extras.padding == Some(Padding::Right))
            }
            Clause::Blocks => has(Feature::BlockSparse),
            Clause::Slopes => has(Feature::Alibi),
            Clause::Sinks => has(Feature::Sinks),
            Clause::Norms => has(Feature::QkNorm),
            Clause::Softcap => has(Feature::Softcap),
            Clause::Dropout => has(Feature::Dropout),
            Clause::SkippedLayers => has(Feature::SkipAllButLast),
            Clause::Evaluation | Clause::SilentOutsideTraining => has(Feature::EvalBypass),
            Clause::Repeated => extras.state.is_some(),

            Clause::GradientScale => are_many && is_plain,
            Clause::QueriesOfAllRanks | Clause::OwnGradients => {
                are_many && matches!(extras.cotangent, Some(Cotangent::Rank(_)))
            }
            Clause::OwnCotangent => matches!(extras.cotangent, Some(Cotangent::Head(_))),
            Clause::ParametersReduced => are_many && asked.has_parameters(),
            Clause::Recomputed => has(Feature::Recompute),

            Clause::CausalOverRanks => are_many && is_plain && is_causal,
            Clause::Rotated => extras.rotary.is_some(),
            Clause::RotatedInThree => has(Feature::Mrope),
            Clause::Distances => are_many && has(Feature::Alibi),
            Clause::DocumentsOverRanks => are_many && extras.documents.is_some(),

            // Attention has no loss.
            Clause::OneLoss
            | Clause::LossOfUnevenCounts
            | Clause::NothingToLearn
            | Clause::LossGradient
            | Clause::LossParameters
            | Clause::LossOverflows
            | Clause::ModelLogits
            | Clause::ModelLoss
            | Clause::ModelLabels
            | Clause::ModelDocuments
            | Clause::WeightGradients
            | Clause::TiedHead
            | Clause::LayersRunAgain
            | Clause::ReplicaLoss => false,

            // Nor tiles of which anybody sees something.
            Clause::TiledOutput
            | Clause::RaggedTiles
            | Clause::TiledMean
            | Clause::EmptyTile
            | Clause::MeanOfTilesByName
            | Clause::TiledGradients
            | Clause::EachTileOnce
            | Clause::PassedGradient
            | Clause::FrozenApart
            | Clause::OneSignal
            | Clause::TilesAlone => false,
            // Nor batches, nor a mesh.
            Clause::PositionsBeforeCut
            | Clause::PositionsOfDocuments
            | Clause::TargetsBeforeCut
            | Clause::TargetsOfDocuments
            | Clause::FilledRows
            | Clause::EveryEntryCut
            | Clause::EveryBatchServed
            | Clause::OneBatchAtATime
            | Clause::EveryEpoch
            | Clause::Coordinates
            | Clause::SequenceNeighbours
            | Clause::DataParallelGroups
            | Clause::StateOverSequence
            | Clause::SumsOfGroups
            | Clause::MpuAnswers => false,

            Clause::UnevenTokens => asked.is_unevenly_long(),
            Clause::NoTokens => has(Feature::EmptyRank),
            // Nor what fills a sequence up there.
            Clause::FillUnseen => {
                asked.is_unevenly_long() && !is_causal && !has(Feature::CrossAttention)
            }
            Clause::ChangedLength => extras.state == Some(State::OtherLength),
            Clause::MadeForOneLength => extras.fixed,

            Clause::TakesPart => are_many && asked.are_ranks_unlike(),

            Clause::SenseIsChecked | Clause::InWords | Clause::Together => false,
            Clause::BeyondTheClaim => {
                let limits = features.range(Feature::GroupedKv..);
                is_plain && limits.into_iter().any(|feature| feature.is_limit())
            }
        }
    }
}

/// A case that has an answer, and what it needs an implementation to support.
struct Asked<'a> {
    case: &'a AttentionCase,
    features: BTreeSet<Feature>,
}

impl Asked<'_> {
    fn of(case: &AttentionCase) -> Asked<'_> {
        Asked {
            case,
            features: case.features(),
        }
    }

    /// Whether nothing is asked beyond sizes, mask and element type.
    fn is_plain(&self) -> bool {
        let cotangent = self.case.extras.cotangent;
        let plain = Extras {
            cotangent,
            ..Extras::default()
        };
        self.case.extras == plain
    }

    /// Whether each rank has a part of the gradient of a parameter.
    fn has_parameters(&self) -> bool {
        let extras = &self.case.extras;
        extras.alibi || extras.sinks || extras.norms
    }

    /// Whether the ranks hold unequal numbers of tokens.
    fn is_unevenly_long(&self) -> bool {
        let shards = self.case.shards();
        shards.iter().any(|shard| shard.len() != shards[0].len())
    }

    /// Whether one rank has more tokens or heads than another.
    fn are_ranks_unlike(&self) -> bool {
        let uneven_heads = !self.case.query_heads.is_multiple_of(self.case.world);
        uneven_heads || self.is_unevenly_long()
    }
}
