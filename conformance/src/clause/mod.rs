//! The clauses of `SPEC.md`: what Ulysses sequence parallelism is, in sentences
//! that can turn out to be wrong.
//!
//! A test holds the list here and the one there together, word by word, and
//! sees to it that every clause has a case that tests it and a mistake that
//! breaks it.

mod batch;
mod cases;
mod loss;
mod mesh;
mod mistakes;
mod model;
mod tiled;

macro_rules! clauses {
    ($($group:literal: $($variant:ident, $id:literal, $sentence:literal;)*)*) => {
        /// A sentence of the specification.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Clause {
            $($(#[doc = $sentence] $variant,)*)*
        }

        impl Clause {
            /// Every clause, group by group.
            pub const ALL: &[Clause] = &[$($(Clause::$variant,)*)*];

            /// The number, as in a list of cases: `H3`.
            pub fn id(self) -> &'static str {
                match self { $($(Clause::$variant => $id,)*)* }
            }

            /// What it is about, as a heading: `Heads`.
            pub fn group(self) -> &'static str {
                match self { $($(Clause::$variant => $group,)*)* }
            }

            /// What it says.
            pub fn sentence(self) -> &'static str {
                match self { $($(Clause::$variant => $sentence,)*)* }
            }
        }
    };
}

clauses! {
"Exchange":
    OwnTokens, "E1",
        "A rank's output is that of its own tokens, in the order in which it holds them.";
    OneOrder, "E2",
        "Queries, keys and values of all ranks meet in one order of tokens, that of the whole sequence.";
    OwnHeads, "E3",
        "Head h of the output is made from head h of the queries, whichever rank made it.";
    SequencesApart, "E4",
        "The sequences of a batch do not see one another.";
    AnyStrides, "E5",
        "The answer depends on the values of the inputs and the cotangent, not on their strides.";
    AnySharding, "E6",
        "The tokens of zigzag and striped shards are attended at their places in the whole sequence, and come back to where they were.";
    ShapeAndType, "E7",
        "The output has the queries' shape with the values' channels, a gradient that of its input, and both the inputs' element type.";

"Heads":
    KvHeadOfQueryHead, "H1",
        "Query head h attends KV head floor(h * Hkv / Hq).";
    GroupIsSummed, "H2",
        "The gradient of a KV head is the sum over the query heads that attend it.";
    KvHeadsAreCopied, "H3",
        "A KV head that several ranks need is given to each of them.";
    CopiesAreSummed, "H4",
        "The gradient of a KV head that was given to several ranks is the sum over these ranks.";
    UnevenHeads, "H5",
        "Every head is answered where the ranks do not divide the number of query heads or of KV heads.";
    FewerHeadsThanRanks, "H6",
        "Every token is answered where some ranks have no query head to attend with.";
    HeadsOfAll, "H7",
        "Slopes, sinks, norm weights and layouts are taken by a head's number of all heads, not by its number on a rank.";

"Attention":
    DenseOutput, "A1",
        "The output is that of dense attention over the tokens of all ranks.";
    Precision, "A2",
        "Output and gradients are as near to those of dense attention as the inputs' element type allows.";
    Causal, "A3",
        "Under a causal mask a query sees its own key and those before it, and none after.";
    Scale, "A4",
        "Products of queries and keys are multiplied by the scale that is given, or else by 1/sqrt(D) of one query head's D channels.";
    Cross, "A5",
        "In cross-attention every query sees all keys of the other sequence once, and the ranks' dK and dV sum to the whole.";
    Window, "A6",
        "A query sees only keys fewer than `window` tokens from its own.";
    Documents, "A7",
        "A query sees no key of another document, told by position ids that restart or by the documents' ends.";
    Padding, "A8",
        "No query sees a padding token, and each sequence of the batch has its own.";
    Blocks, "A9",
        "A query sees a key only if the layout has the block of both.";
    Slopes, "A10",
        "With ALiBi a score is less by the slope of its head times the distance of query and key.";
    Sinks, "A11",
        "The softmax of a head has exp(sink) once in its denominator.";
    Norms, "A12",
        "Queries and keys are divided by their root mean square over a head's channels and weighted, before they are rotated.";
    Softcap, "A13",
        "A scaled score s becomes softcap * tanh(s / softcap), before slopes and mask.";
    Dropout, "A14",
        "Each weight is dropped on its own with probability p, those that are kept are divided by 1 - p, and the backward drops the same.";
    SkippedLayers, "A15",
        "Of several layers only the last attends, and the others hand on their queries, and the gradients of these, as they came.";
    Evaluation, "A16",
        "Outside training every rank answers the whole sequence that it holds, under the same mask.";
    Repeated, "A17",
        "An answer does not depend on what was asked before it, to the bit.";

"Gradients":
    DenseGradients, "G1",
        "dQ, dK and dV are the gradients of dense attention for the cotangent that was handed over.";
    GradientScale, "G2",
        "Gradients have the scale of the declared convention, on any number of ranks.";
    QueriesOfAllRanks, "G3",
        "Keys and values get gradient from the queries of every rank.";
    OwnGradients, "G4",
        "Backward gives each rank the gradients of its own tokens.";
    OwnCotangent, "G5",
        "The cotangent of a head reaches that query head and its KV head, and no other.";
    ParametersReduced, "G6",
        "The ranks' parts of a parameter's gradient are, once reduced as declared, the gradient of dense attention.";
    Recomputed, "G7",
        "A forward that is recomputed in the backward gives the gradients of one that was not.";

"Positions":
    CausalOverRanks, "P1",
        "What is before and after goes by positions in the whole sequence, on whatever ranks query and key are.";
    Rotated, "P2",
        "Queries and keys are rotated by the position ids that came with them, not by their place on a rank.";
    RotatedInThree, "P3",
        "Each section of channel pairs is rotated by its own component of the position ids.";
    Distances, "P4",
        "ALiBi's distances are those of positions in the whole sequence.";
    DocumentsOverRanks, "P5",
        "A document that reaches over several ranks is one, and does not end where a shard ends.";

"Loss":
    OneLoss, "X1",
        "The loss is the sum over all ranks' tokens whose label is not ignored, divided by their number, and the same on every rank.";
    LossOfUnevenCounts, "X2",
        "Ranks that have other numbers of such tokens weigh by these numbers, and one that has none weighs nothing.";
    NothingToLearn, "X3",
        "Where no token of any rank has a label, loss and gradients are 0.";
    LossGradient, "X4",
        "Each rank's logits, or hidden states, have the gradient of the one loss, whatever cotangent comes.";
    LossParameters, "X5",
        "The ranks' parts of the gradient of the head are, once reduced as declared, the gradient of the one loss.";
    LossOverflows, "X6",
        "Logits whose exponentials overflow have the loss and gradient that they have.";

"Tiles":
    TiledOutput, "T1",
        "The output is that of the function of all of the rank's tokens, in their order, however many tiles they are cut into.";
    RaggedTiles, "T2",
        "Every token is answered where the last tile is shorter than the others, and where there are more tiles than tokens.";
    TiledMean, "T3",
        "A mean is over the rank's tokens whose label is not ignored, however these are spread over tiles.";
    EmptyTile, "T4",
        "A tile of which no token counts adds nothing, and where none counts at all loss and gradients are 0.";
    MeanOfTilesByName, "T5",
        "The mean of the tiles' means is taken where it is asked for by that name.";
    TiledGradients, "T6",
        "Gradients are those of the output that was given, for whatever cotangent comes.";
    EachTileOnce, "T7",
        "The gradient of a weight is the sum over all tiles, each of them once.";
    PassedGradient, "T8",
        "What every tile sees whole has the sum over tiles as its gradient, if it is a weight or not.";
    FrozenApart, "T9",
        "What is frozen is given no gradient, and what is not has its own all the same.";
    OneSignal, "T10",
        "The gradient of a parameter is announced once in a backward, when it is whole.";
    TilesAlone, "T11",
        "A rank's gradient of a weight is that of its own tokens, a part that adds up with those of the others.";

"Batch":
    PositionsBeforeCut, "B1",
        "A token's position is counted in its whole row, whichever rank has the token.";
    PositionsOfDocuments, "B2",
        "Positions begin anew with each packed document, be it told by its positions or by its end.";
    TargetsBeforeCut, "B3",
        "The target of a token is the label of the next token of its row, on whatever rank that is.";
    TargetsOfDocuments, "B4",
        "The last token of a row has no target, nor has the last of a document, unless targets are asked for across documents.";
    FilledRows, "B5",
        "Rows are filled up by the rule that is given, and what fills them up has no target.";
    EveryEntryCut, "B6",
        "Every entry with a value for each token is cut as the row is, and each token is on one rank.";
    EveryBatchServed, "B7",
        "Every batch of every rank is served once, round by round and in the order of ranks, also where ranks have other numbers of them.";
    OneBatchAtATime, "B8",
        "At any time all ranks have shards of one batch.";
    EveryEpoch, "B9",
        "Every epoch serves all batches.";

"Mesh":
    Coordinates, "M1",
        "Rank (i * dp_shard + j) * sp + k of the world has the coordinates i, j and k.";
    SequenceNeighbours, "M2",
        "The ranks that share a sequence are neighbours in the world.";
    DataParallelGroups, "M3",
        "The ranks of a data-parallel group have the same part of other sequences, and differ along its axes alone.";
    StateOverSequence, "M4",
        "One copy of the state is sharded over the dp_shard x sp ranks of one replica.";
    SumsOfGroups, "M5",
        "What is added up over a group is added up over its members and nobody else.";
    MpuAnswers, "M6",
        "Asked as DeepSpeed asks, model-parallel ranks are those of a sequence, sequence-data-parallel ones the world, and a rank is counted in its group.";

"Decoder":
    ModelLogits, "D1",
        "The logits of a rank's tokens are those of the dense decoder, at their positions in the whole sequence, in every layer.";
    ModelLoss, "D2",
        "A model's loss is the sum over the tokens of all ranks of all replicas whose label is not ignored, divided by their number, and the same on every rank.";
    ModelLabels, "D3",
        "A label that was shifted before the cut is taken as it is, and the last token of a shard has the one that follows on the next rank.";
    ModelDocuments, "D4",
        "Documents that are packed into a sequence do not see one another, in any layer and on whatever ranks they are.";
    WeightGradients, "D5",
        "The ranks' parts of every weight's gradient, of norms and embedding too, add up over all ranks of all replicas to that of the one loss, whatever cotangent comes.";
    TiedHead, "D6",
        "A head that is the embedding has one gradient, of both its uses.";
    LayersRunAgain, "D7",
        "Layers that run again in backward have the gradients of layers that did not.";
    ReplicaLoss, "D8",
        "Replicas that have other numbers of labels weigh by these numbers.";

"Lengths":
    UnevenTokens, "L1",
        "Every token is answered where the ranks hold unequal numbers of tokens.";
    NoTokens, "L2",
        "A rank that holds no token takes part, and answers with no token.";
    FillUnseen, "L3",
        "What fills a sequence up to a multiple of the ranks is seen by no query.";
    ChangedLength, "L4",
        "After a call of another length only the length of the call at hand counts.";
    MadeForOneLength, "L5",
        "An attention made for one length answers that length, and refuses another in words.";

"Communication":
    TakesPart, "C1",
        "Every rank enters each collective that another enters, and lives until it is told to leave.";
    SilentOutsideTraining, "C2",
        "Outside training no rank sends anything.";

"Refusal":
    SenseIsChecked, "R1",
        "Input that makes no sense is refused.";
    InWords, "R2",
        "A refusal says why.";
    Together, "R3",
        "Where one rank refuses every rank does, and none waits for another.";
    ClaimsAreKept, "R4",
        "What an implementation claims to support it does not refuse.";
    BeyondTheClaim, "R5",
        "What an implementation does not claim it refuses, if it does not answer it rightly.";
}
