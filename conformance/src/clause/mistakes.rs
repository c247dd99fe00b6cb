//! Which clauses a mistake breaks.

use super::Clause;
use crate::diagnosis::Mistake;

impl Clause {
    /// The clauses that `mistake` breaks, the main one first.
    pub fn of_mistake(mistake: Mistake) -> &'static [Clause] {
        match mistake {
            Mistake::RanksReordered | Mistake::KeysReordered => &[Clause::OneOrder],
            Mistake::OutputToWrongRank => &[Clause::OwnTokens],
            Mistake::OutputHeadsReordered | Mistake::OutputHeadsInterleaved => &[Clause::OwnHeads],
            Mistake::BatchMixedIntoSequence => &[Clause::SequencesApart],
            Mistake::StridesIgnored => &[Clause::AnyStrides],
            Mistake::ShardingIgnored => &[
                Clause::AnySharding,
                Clause::CausalOverRanks,
                Clause::EveryEntryCut,
            ],
            Mistake::WrongShape => &[Clause::ShapeAndType],

            Mistake::KvHeadsTiled => &[Clause::KvHeadOfQueryHead, Clause::OwnCotangent],
            Mistake::KvHeadsOfOtherRank => &[Clause::KvHeadsAreCopied, Clause::KvHeadOfQueryHead],
            Mistake::ReplicasNotSummed | Mistake::ReplicasAveraged => &[Clause::CopiesAreSummed],
            Mistake::GroupNotSummed => &[Clause::GroupIsSummed],
            Mistake::RemainderHeadsLost => &[
                Clause::UnevenHeads,
                Clause::FewerHeadsThanRanks,
                Clause::BeyondTheClaim,
            ],
            Mistake::SlopesOfLocalHeads
            | Mistake::SinksOfLocalHeads
            | Mistake::NormsOfLocalHeads
            | Mistake::LayoutOfLocalHeads => &[Clause::HeadsOfAll],

            Mistake::CausalIgnored | Mistake::CausalStrict => &[Clause::Causal],
            Mistake::LocalTokensOnly => &[Clause::DenseOutput, Clause::Cross],
            Mistake::ScaleMissing | Mistake::ScaleByHidden | Mistake::ScaleIgnored => {
                &[Clause::Scale]
            }
            Mistake::WindowIgnored | Mistake::WindowOffByOne => &[Clause::Window],
            Mistake::DocumentsIgnored => &[
                Clause::Documents,
                Clause::ModelDocuments,
                Clause::BeyondTheClaim,
            ],
            Mistake::PaddingIgnored => &[Clause::Padding],
            Mistake::SoftcapIgnored => &[Clause::Softcap],
            Mistake::SinksIgnored => &[Clause::Sinks],
            Mistake::SlopesIgnored => &[Clause::Slopes],
            Mistake::LayoutIgnored => &[Clause::Blocks],
            Mistake::MaskDroppedInEval => &[Clause::Evaluation],
            Mistake::DropoutShared | Mistake::DropoutNotRescaled => &[Clause::Dropout],
            Mistake::NormsIgnored => &[Clause::Norms],

            Mistake::GradientsOverRanks | Mistake::GradientsTimesRanks => &[Clause::GradientScale],
            Mistake::KvGradientsOverRanks => &[Clause::GradientScale, Clause::Cross],
            Mistake::OtherRanksGradientLost => &[Clause::QueriesOfAllRanks],
            Mistake::KeyAndValueGradientSwapped => &[Clause::DenseGradients],
            Mistake::GradientZero => &[
                Clause::DenseGradients,
                Clause::SkippedLayers,
                Clause::Recomputed,
            ],
            Mistake::BackwardToWrongRank => &[Clause::OwnGradients],
            Mistake::CotangentStridesIgnored => &[Clause::AnyStrides, Clause::OwnCotangent],
            Mistake::HeadStateAveraged | Mistake::HeadStateOfOneRank => {
                &[Clause::ParametersReduced]
            }
            Mistake::OtherConvention => &[Clause::GradientScale, Clause::ParametersReduced],

            Mistake::CausalByLocalIndex => &[Clause::CausalOverRanks],
            Mistake::RotaryByLocalPosition | Mistake::RotaryOfKeysOnly | Mistake::RotaryIgnored => {
                &[Clause::Rotated]
            }
            Mistake::FirstComponentOnly => &[Clause::RotatedInThree],
            Mistake::SlopesByLocalDistance => &[Clause::Distances],
            Mistake::DocumentsCutAtShards => &[Clause::DocumentsOverRanks],

            Mistake::MeanOfRankMeans => &[Clause::LossOfUnevenCounts],
            Mistake::OwnTokensOnly => &[Clause::OneLoss, Clause::ModelLoss],
            Mistake::IgnoredCounted => &[Clause::OneLoss, Clause::TiledMean],
            Mistake::NotANumber => &[
                Clause::NothingToLearn,
                Clause::LossOverflows,
                Clause::EmptyTile,
            ],
            Mistake::CotangentIgnored => &[Clause::LossGradient, Clause::TiledGradients],
            Mistake::HeadOfOneRank => &[Clause::LossParameters],

            Mistake::MeanOfTiles => &[Clause::TiledMean],
            Mistake::MeanOfTokens => &[Clause::MeanOfTilesByName],
            Mistake::TileMeansInBackward => &[Clause::TiledGradients],
            Mistake::TilesReordered => &[Clause::TiledOutput],
            Mistake::LastTileLost => &[Clause::RaggedTiles],
            Mistake::GradientOfLastTile | Mistake::AccumulatedTwice => &[Clause::EachTileOnce],
            Mistake::PassedGradientLost => &[Clause::PassedGradient],
            Mistake::FrozenStopsAll | Mistake::FrozenGradient => &[Clause::FrozenApart],
            Mistake::AnnouncedPerTile => &[Clause::OneSignal],
            Mistake::ReducedUnasked => &[Clause::TilesAlone],

            Mistake::LabelsShiftedAfterCut
            | Mistake::LabelsShiftedTwice
            | Mistake::LabelsNotShifted => &[Clause::TargetsBeforeCut],
            Mistake::PositionsOfShards => &[Clause::PositionsBeforeCut],
            Mistake::PositionsRunOn => &[Clause::PositionsOfDocuments],
            Mistake::TargetsAcrossDocuments => &[Clause::TargetsOfDocuments],
            Mistake::FillIsTarget | Mistake::FillPositionsZero => &[Clause::FilledRows],
            Mistake::MaskNotCut | Mistake::ShardOfFirstRank => &[Clause::EveryEntryCut],
            Mistake::SameBatchServed | Mistake::LastBatchesDropped => &[Clause::EveryBatchServed],
            Mistake::OwnBatchesOnly => &[Clause::OneBatchAtATime],
            Mistake::SecondEpochEmpty => &[Clause::EveryEpoch],

            Mistake::GroupsStrided => &[Clause::SequenceNeighbours, Clause::Coordinates],
            Mistake::AxesSwapped => &[Clause::Coordinates, Clause::DataParallelGroups],
            Mistake::StateNotOverSequence => &[Clause::StateOverSequence],
            Mistake::SumOverWorld => &[Clause::SumsOfGroups],
            Mistake::WorldRankInGroup => &[Clause::MpuAnswers],

            Mistake::LastLayerLocal => &[Clause::ModelLogits],
            Mistake::RecomputedElsewhere => &[Clause::LayersRunAgain],
            Mistake::TiedGradientLost => &[Clause::TiedHead],
            Mistake::ReplicatedOfOneRank => &[Clause::WeightGradients],
            Mistake::LabelsShiftedAgain | Mistake::EndOfShardUntrained => &[Clause::ModelLabels],
            Mistake::MeanOfReplicaMeans => &[Clause::ReplicaLoss],

            Mistake::RemainderTokensLost => &[
                Clause::UnevenTokens,
                Clause::NoTokens,
                Clause::BeyondTheClaim,
            ],
            Mistake::FillTokensSeen => &[Clause::FillUnseen],
            Mistake::StaleLength => &[
                Clause::ChangedLength,
                Clause::MadeForOneLength,
                Clause::Repeated,
            ],

            Mistake::ExchangeInBf16
            | Mistake::GradientsInBf16
            | Mistake::PartialResultsInBf16
            | Mistake::BiasedRounding => &[Clause::Precision],

            Mistake::StateKept => &[Clause::Repeated, Clause::Recomputed],

            Mistake::RankStaysAway => &[Clause::TakesPart, Clause::NoTokens, Clause::Together],
            Mistake::RankDies => &[Clause::TakesPart],
            Mistake::SendsInEval => &[Clause::SilentOutsideTraining],

            Mistake::BadInputTaken => &[Clause::SenseIsChecked, Clause::MadeForOneLength],
            Mistake::RefusedWithoutWords => &[Clause::InWords],
            Mistake::GoodInputRefused => &[Clause::ClaimsAreKept],
            Mistake::OneRankRefuses => &[Clause::Together],
        }
    }
}
