//! The mistakes that are known by name: what a diagnosis can say, and what the
//! faults of the suite make on purpose.

/// What kind of mistake it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Where tokens and heads are put when they are exchanged.
    Exchange,
    /// Which head attends which, and what becomes of copies of KV heads.
    Heads,
    /// What attention computes.
    Attention,
    /// Gradients and their scale.
    Gradients,
    /// Positions, and the masks that follow from them.
    Positions,
    /// Sequence lengths, and how ranks share them.
    Lengths,
    /// The loss, and how the ranks' parts of it become one.
    Loss,
    /// Functions that are computed in tiles, and how the tiles become one.
    Tiles,
    /// What ranks have of a batch.
    Batch,
    /// Where ranks stand in a mesh.
    Mesh,
    /// How the parts of a decoder are put together among ranks.
    Decoder,
    /// Element types.
    Precision,
    /// What one call leaves behind for the next.
    State,
    /// Who waits for whom, and who sends.
    Communication,
    /// What is refused, and how.
    Refusal,
}

impl Class {
    /// The name, as in a table: `heads`.
    pub fn name(self) -> &'static str {
        match self {
            Class::Exchange => "exchange",
            Class::Heads => "heads",
            Class::Attention => "attention",
            Class::Gradients => "gradients",
            Class::Positions => "positions",
            Class::Lengths => "lengths",
            Class::Loss => "loss",
            Class::Tiles => "tiles",
            Class::Batch => "batch",
            Class::Mesh => "mesh",
            Class::Decoder => "decoder",
            Class::Precision => "precision",
            Class::State => "state",
            Class::Communication => "communication",
            Class::Refusal => "refusal",
        }
    }
}

macro_rules! mistakes {
    ($($variant:ident, $name:literal, $class:ident, $sentence:literal, $look_at:literal;)*) => {
        /// A mistake that has a name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Mistake {
            $(#[doc = $sentence] $variant,)*
        }

        impl Mistake {
            /// Every mistake, class by class.
            pub const ALL: &[Mistake] = &[$(Mistake::$variant,)*];

            /// The name, as in a table: `kv-heads-tiled`.
            pub fn name(self) -> &'static str {
                match self { $(Mistake::$variant => $name,)* }
            }

            /// What kind of mistake it is.
            pub fn class(self) -> Class {
                match self { $(Mistake::$variant => Class::$class,)* }
            }

            /// What was done, in a sentence.
            pub fn sentence(self) -> &'static str {
                match self { $(Mistake::$variant => $sentence,)* }
            }

            /// Where a person who mends it looks first.
            pub fn look_at(self) -> &'static str {
                match self { $(Mistake::$variant => $look_at,)* }
            }
        }
    };
}

mistakes! {
    RanksReordered, "ranks-reordered", Exchange,
        "The ranks' tokens are put together in another order than that of the ranks.",
        "the order in which the first all-to-all's blocks are concatenated along the sequence";
    KeysReordered, "keys-reordered", Exchange,
        "K and V have the ranks' tokens in different orders.",
        "whether q, k and v go through the same first all-to-all";
    OutputToWrongRank, "output-to-wrong-rank", Exchange,
        "The second exchange gives each rank another rank's tokens.",
        "the order of the blocks that the second all-to-all sends";
    OutputHeadsReordered, "output-heads-reordered", Exchange,
        "The second exchange puts the ranks' heads together in another order than that of the ranks.",
        "the order in which the second all-to-all's blocks are concatenated along the heads";
    OutputHeadsInterleaved, "output-heads-interleaved", Exchange,
        "The second exchange interleaves the ranks' heads: [h/P, P] is read where [P, h/P] is there.",
        "the transpose or permute between the second all-to-all and its reshape";
    BatchMixedIntoSequence, "batch-mixed-into-sequence", Exchange,
        "With more than one sequence in the batch, tokens of different sequences are mixed.",
        "whether the reshape around the all-to-all knows of the batch dimension";
    StridesIgnored, "strides-ignored", Exchange,
        "Inputs that are not contiguous are read as if they were.",
        "a missing .contiguous() before the memory of a tensor is sent";
    ShardingIgnored, "sharding-ignored", Exchange,
        "Zigzag or striped shards are taken for contiguous runs of tokens.",
        "whether tokens are put in global order after the first exchange, and back before the second";
    WrongShape, "wrong-shape", Exchange,
        "The answer has the right numbers in another shape or element type, or not all of them.",
        "a missing view, transpose or cast at the very end";

    KvHeadsTiled, "kv-heads-tiled", Heads,
        "KV heads are repeated as 0 1 0 1, where 0 0 1 1 is due.",
        "repeat in place of repeat_interleave where KV heads are expanded or replicated";
    KvHeadsOfOtherRank, "kv-heads-of-other-rank", Heads,
        "Where KV heads are replicated, ranks get the KV heads that belong to another rank.",
        "the formula for a rank's KV heads: rank * Hkv / P, not rank mod Hkv";
    ReplicasNotSummed, "replicas-not-summed", Heads,
        "Of a KV head that several ranks hold, the gradient of one of them alone is kept.",
        "the sum over ranks in the backward of KV head replication";
    ReplicasAveraged, "replicas-averaged", Heads,
        "The gradients of a replicated KV head are averaged over the ranks that hold it, not summed.",
        "a mean, or a division by the number of replicas, in the backward of KV head replication";
    GroupNotSummed, "group-not-summed", Heads,
        "Of the query heads that attend a KV head, one alone contributes to its gradient.",
        "the sum over a group of query heads in the backward of KV head expansion";
    RemainderHeadsLost, "remainder-heads-lost", Heads,
        "Heads that the ranks do not divide evenly are lost.",
        "a floor division of the number of heads by the number of ranks";
    SlopesOfLocalHeads, "slopes-of-local-heads", Heads,
        "ALiBi slopes are taken by a head's number on its rank, not by its number of all.",
        "whether slopes are sliced by the rank's first head";
    SinksOfLocalHeads, "sinks-of-local-heads", Heads,
        "Sinks are taken by a head's number on its rank, not by its number of all.",
        "whether sinks are sliced by the rank's first head";
    NormsOfLocalHeads, "norms-of-local-heads", Heads,
        "Norm weights are taken by a head's number on its rank, not by its number of all.",
        "whether the norms' weights are sliced by the rank's first head";
    LayoutOfLocalHeads, "layout-of-local-heads", Heads,
        "Block layouts are taken by a head's number on its rank, not by its number of all.",
        "whether the layout is sliced by the rank's first head";

    CausalIgnored, "causal-ignored", Attention,
        "Queries see the keys behind them: there is no causal mask.",
        "whether is_causal reaches the core attention";
    CausalStrict, "causal-strict", Attention,
        "Queries do not see their own token: the causal mask is off by one.",
        "the diagonal of the causal mask";
    LocalTokensOnly, "local-tokens-only", Attention,
        "Queries see only the tokens of their own rank.",
        "whether the exchange happens at all";
    ScaleMissing, "scale-missing", Attention,
        "Scores are not scaled.",
        "the scale that reaches the core attention";
    ScaleByHidden, "scale-by-hidden", Attention,
        "Scores are divided by the root of all heads' channels, not of one head's.",
        "whether the scale is made of head_dim or of hidden_size";
    ScaleIgnored, "scale-ignored", Attention,
        "The scale that is given is ignored: 1/sqrt(D) is taken.",
        "whether the scale reaches the core attention";
    WindowIgnored, "window-ignored", Attention,
        "Queries see keys beyond the sliding window.",
        "whether the window reaches the core attention";
    WindowOffByOne, "window-off-by-one", Attention,
        "The sliding window is one token too wide.",
        "whether the window counts the query's own token";
    DocumentsIgnored, "documents-ignored", Attention,
        "Packed documents see one another.",
        "whether documents reach the core attention as a mask or as cumulative lengths";
    PaddingIgnored, "padding-ignored", Attention,
        "Padding tokens are seen.",
        "whether the attention mask is gathered and reaches the core attention";
    SoftcapIgnored, "softcap-ignored", Attention,
        "Scores are not capped.",
        "whether the softcap reaches the core attention";
    SinksIgnored, "sinks-ignored", Attention,
        "The softmax's denominator lacks the sinks.",
        "whether sinks reach the core attention";
    SlopesIgnored, "slopes-ignored", Attention,
        "ALiBi is left out.",
        "whether slopes reach the core attention";
    LayoutIgnored, "layout-ignored", Attention,
        "Queries see blocks of keys that the layout hides.",
        "whether the block layout reaches the core attention";
    MaskDroppedInEval, "mask-dropped-in-eval", Attention,
        "Outside training the mask is dropped.",
        "what the bypass of evaluation hands to the core attention";
    DropoutShared, "dropout-shared", Attention,
        "Heads of different ranks drop the same weights.",
        "the generator's seed on each rank, or the number of a head in it";
    DropoutNotRescaled, "dropout-not-rescaled", Attention,
        "Weights that are kept are not divided by 1 - p.",
        "the multiplier of weights that are kept";
    NormsIgnored, "norms-ignored", Attention,
        "Queries and keys are not normalised.",
        "whether the head norm is applied";

    GradientsOverRanks, "gradients-over-ranks", Gradients,
        "All gradients are divided by the number of ranks.",
        "a mean over ranks in backward, or a loss divided by the number of ranks";
    GradientsTimesRanks, "gradients-times-ranks", Gradients,
        "All gradients are multiplied by the number of ranks.",
        "a sum over ranks in backward that is one too many, or a loss multiplied by the number of ranks";
    KvGradientsOverRanks, "kv-gradients-over-ranks", Gradients,
        "dK and dV are divided by the number of ranks, dQ is not.",
        "a mean over ranks where K's and V's gradients are summed";
    OtherRanksGradientLost, "other-ranks-gradient-lost", Gradients,
        "A rank's K and V get gradient from its own queries alone.",
        "a gather whose backward takes a slice where a reduce-scatter is due";
    KeyAndValueGradientSwapped, "key-and-value-gradient-swapped", Gradients,
        "dK and dV are given back in each other's place.",
        "the order of what the custom backward returns";
    GradientZero, "gradient-zero", Gradients,
        "A gradient does not arrive at all: it is zero.",
        "a detach, or a collective without a backward, on the way to that input";
    BackwardToWrongRank, "backward-to-wrong-rank", Gradients,
        "The output is right, and backward gives each rank another rank's gradients.",
        "the order of blocks in the backward of the exchange";
    CotangentStridesIgnored, "cotangent-strides-ignored", Gradients,
        "A cotangent that is not contiguous is read as if it were.",
        "a missing .contiguous() on the gradient before it is sent";
    HeadStateAveraged, "head-state-averaged", Gradients,
        "Gradients of parameters that belong to heads are divided by the number of ranks.",
        "a mean over ranks where each rank's part is to be summed";
    HeadStateOfOneRank, "head-state-of-one-rank", Gradients,
        "Of the gradients of parameters that belong to heads, one rank's part alone is kept.",
        "the all-reduce of parameter gradients over the sequence-parallel group";
    OtherConvention, "other-convention", Gradients,
        "Gradients are right by another convention of scale than the one that is declared.",
        "the declared `upstream` and `parameters`, or a factor of the number of ranks";

    CausalByLocalIndex, "causal-by-local-index", Positions,
        "The causal mask compares a token's number on its rank, not its number of all.",
        "the query offset of the causal mask";
    RotaryByLocalPosition, "rotary-by-local-position", Positions,
        "Rotary positions begin anew on every rank.",
        "whether position ids are made from the local length";
    RotaryOfKeysOnly, "rotary-of-keys-only", Positions,
        "Keys are rotated and queries are not.",
        "where rotary is applied to q";
    RotaryIgnored, "rotary-ignored", Positions,
        "Queries and keys are not rotated.",
        "whether rotary is applied";
    FirstComponentOnly, "first-component-only", Positions,
        "Of three components of positions only the first is used.",
        "whether position_ids [3, B, s] are taken for [B, s]";
    SlopesByLocalDistance, "slopes-by-local-distance", Positions,
        "ALiBi distances are those of tokens' numbers on their ranks.",
        "the positions from which the distances are made";
    DocumentsCutAtShards, "documents-cut-at-shards", Positions,
        "Documents end where shards end.",
        "whether cumulative lengths are made of local position ids";

    MeanOfRankMeans, "mean-of-rank-means", Loss,
        "The loss is the mean of the ranks' means, whatever their numbers of labels are.",
        "the weights with which the ranks' losses are averaged: n_r / N, not 1 / P";
    OwnTokensOnly, "own-tokens-only", Loss,
        "Each rank has the loss of its own tokens, not that of all.",
        "whether the ranks' sums and numbers of labels are added up";
    IgnoredCounted, "ignored-counted", Loss,
        "The loss is divided by the number of all tokens, those with an ignored label included.",
        "the number by which the sum of losses is divided";

    NotANumber, "not-a-number", Loss,
        "Numbers of the answer are none: NaN or infinite.",
        "a division by a number of labels that is 0, or exponentials of which the largest is not taken off first";
    CotangentIgnored, "cotangent-ignored", Loss,
        "Gradients are those for a cotangent of 1, whatever came.",
        "whether the backward multiplies by the gradient that comes in";
    HeadOfOneRank, "head-of-one-rank", Loss,
        "Of the ranks' parts of the head's gradient, that of rank 0 alone is there.",
        "the all-reduce of parameter gradients over the sequence-parallel group";

    MeanOfTiles, "mean-of-tiles", Tiles,
        "The loss is the mean of the tiles' means, where the mean over tokens is asked for.",
        "the weights with which the tiles' losses are averaged: n_t / n, not 1 / T";
    MeanOfTokens, "mean-of-tokens", Tiles,
        "The loss is the mean over tokens, where the mean of the tiles' means is asked for.",
        "whether the reduction that is asked for reaches the tiles";
    TileMeansInBackward, "tile-means-in-backward", Tiles,
        "The loss is the mean over tokens, and its gradient that of the mean of the tiles' means.",
        "the weights of the tiles in backward, which are those of forward";
    TilesReordered, "tiles-reordered", Tiles,
        "The tiles' outputs are put together in another order than that of the tiles.",
        "the order in which the tiles' outputs are concatenated";
    LastTileLost, "last-tile-lost", Tiles,
        "The tokens of a last tile that is shorter than the others are lost.",
        "a floor division of the number of tokens by the number of tiles";
    GradientOfLastTile, "gradient-of-last-tile", Tiles,
        "A weight has the gradient of the last tile alone.",
        "whether a tile's gradient is added to those before it, or put in their place";
    AccumulatedTwice, "accumulated-twice", Tiles,
        "The gradient of a weight is there twice.",
        "whether backward accumulates each tile's gradient and gives back their sum as well";
    PassedGradientLost, "passed-gradient-lost", Tiles,
        "What every tile sees whole, and is no weight, gets no gradient.",
        "which inputs the custom backward returns a gradient for";
    FrozenStopsAll, "frozen-input-stops-all", Tiles,
        "Where the input is frozen the weights get no gradient either.",
        "whether backward is made to depend on the input's requires_grad alone";
    FrozenGradient, "frozen-gradient", Tiles,
        "What is frozen is given a gradient.",
        "whether backward asks which of its inputs need a gradient";
    AnnouncedPerTile, "announced-per-tile", Tiles,
        "The gradient of a parameter is announced with every tile.",
        "an AccumulateGrad for each tile: hooks of DDP and ZeRO then run before the gradient is whole";
    ReducedUnasked, "reduced-unasked", Tiles,
        "Each rank has the sum of all ranks' gradients of a parameter, which is then summed again.",
        "an all-reduce within the tiled function, where the optimizer or a wrapper has its own";

    LabelsShiftedAfterCut, "labels-shifted-after-cut", Batch,
        "Labels are shifted when they are cut: each shard's last token has no target.",
        "whether labels are shifted before they are cut";
    LabelsShiftedTwice, "labels-shifted-twice", Batch,
        "Labels are shifted twice: the target of a token is the one after the next.",
        "who else shifts: the collator, the data loader, the model's loss";
    LabelsNotShifted, "labels-not-shifted", Batch,
        "Labels are not shifted: the target of a token is itself.",
        "whether anybody shifts the labels";
    PositionsOfShards, "positions-of-shards", Batch,
        "Positions begin anew on every rank.",
        "whether position ids are made before the cut";
    PositionsRunOn, "positions-run-on", Batch,
        "Positions do not begin anew with each packed document.",
        "whether position ids are made of the documents' ends";
    TargetsAcrossDocuments, "targets-across-documents", Batch,
        "The last token of a document has the first of the next as its target.",
        "whether the ends of documents are known where labels are shifted";
    FillIsTarget, "fill-is-target", Batch,
        "What fills rows up is learnt.",
        "the value that labels are filled up with";
    FillPositionsZero, "fill-positions-zero", Batch,
        "What fills rows up has the position 0, and so is a document of its own, token by token.",
        "the value that position ids are filled up with";
    MaskNotCut, "mask-not-cut", Batch,
        "The attention mask is whole on every rank.",
        "whether every entry with a value for each token is cut";
    ShardOfFirstRank, "shard-of-first-rank", Batch,
        "Every rank has the first rank's shard.",
        "the rank by which rows are cut";
    SameBatchServed, "same-batch-served", Batch,
        "Of a round's batches one is served again and again.",
        "the index of the source rank in the loop over gathered batches";
    OwnBatchesOnly, "own-batches-only", Batch,
        "Each rank has shards of its own batches: the ranks of a sequence work on different ones.",
        "whether batches are gathered, or the sampler gives the ranks of a group the same ones";
    LastBatchesDropped, "last-batches-dropped", Batch,
        "Batches are dropped where some ranks have more of them than others.",
        "the condition on which an epoch ends";
    SecondEpochEmpty, "second-epoch-empty", Batch,
        "The second epoch has no batch.",
        "whether the iterator over batches is made anew";

    GroupsStrided, "groups-strided", Mesh,
        "The ranks that share a sequence are not neighbours: the sequence is the slowest axis of the mesh.",
        "the order of the axes of the mesh";
    AxesSwapped, "axes-swapped", Mesh,
        "The axes dp_replicate and dp_shard are in each other's place.",
        "the order of the axes of the mesh";
    StateNotOverSequence, "state-not-over-sequence", Mesh,
        "State is sharded over data-parallel ranks alone, and the ranks of a sequence keep copies that drift apart.",
        "the group that the optimizer or the wrapper is given";
    SumOverWorld, "sum-over-world", Mesh,
        "What is to be added up over a group is added up over the world.",
        "the group that the collective is given";
    WorldRankInGroup, "world-rank-in-group", Mesh,
        "A rank's number in the world is taken for its number in a group.",
        "whether ranks are asked of the group";

    LastLayerLocal, "last-layer-local", Decoder,
        "In the last layer queries see only the tokens of their own rank.",
        "whether every layer calls the attention that was registered";
    RecomputedElsewhere, "recomputed-elsewhere", Decoder,
        "Layers that run again in backward do so with positions that begin anew on every rank.",
        "what a checkpointed layer keeps, and what it makes again";
    TiedGradientLost, "tied-gradient-lost", Decoder,
        "A tied head's gradient lacks what it gets as a head.",
        "whether head and embedding are one parameter behind the wrapper";
    ReplicatedOfOneRank, "replicated-of-one-rank", Decoder,
        "Of the gradients of norms and embedding, rank 0's part alone is there.",
        "the all-reduce of parameters that are no projections";
    LabelsShiftedAgain, "labels-shifted-again", Decoder,
        "Labels that have been shifted are shifted once more.",
        "whether the model's own loss shifts what it is given as `labels`";
    EndOfShardUntrained, "end-of-shard-untrained", Decoder,
        "The last token of each shard has no label.",
        "whether labels are shifted before the sequence is cut";
    MeanOfReplicaMeans, "mean-of-replica-means", Decoder,
        "The loss is the mean of the replicas' means, whatever their numbers of labels are.",
        "whether numbers of labels are added up over all replicas";

    RemainderTokensLost, "remainder-tokens-lost", Lengths,
        "Tokens that the ranks do not divide evenly are lost.",
        "a floor division of the sequence length by the number of ranks";
    FillTokensSeen, "fill-tokens-seen", Lengths,
        "Tokens that fill a sequence up to a multiple of the ranks are seen as keys.",
        "whether the fill is masked or cut off before the core attention";
    StaleLength, "stale-length", Lengths,
        "After a change of length the length of an earlier call is used.",
        "shapes that are kept from the first call";

    ExchangeInBf16, "exchange-in-bf16", Precision,
        "Numbers are rounded to bfloat16 on the way.",
        "the element type of the buffers of the all-to-all";
    GradientsInBf16, "gradients-in-bf16", Precision,
        "The output has the precision that is due, and gradients are rounded to bfloat16.",
        "the element type in which gradients are exchanged or reduced";
    PartialResultsInBf16, "partial-results-in-bf16", Precision,
        "Partial results are rounded to the element type before they are added up.",
        "the element type in which block outputs or partial sums are kept";
    BiasedRounding, "biased-rounding", Precision,
        "Numbers are rounded towards zero.",
        "a truncation in place of a rounding to nearest";

    StateKept, "state-kept", State,
        "An answer depends on what was asked before it.",
        "what the module keeps from call to call";

    RankStaysAway, "rank-stays-away", Communication,
        "A rank does not enter a collective in which the others wait.",
        "a condition around a collective that is not the same on every rank";
    RankDies, "rank-dies", Communication,
        "A rank ends.",
        "the standard error of that rank";
    SendsInEval, "sends-in-eval", Communication,
        "Outside training data is sent.",
        "whether the bypass of evaluation comes before the exchange";

    BadInputTaken, "bad-input-taken", Refusal,
        "Input that makes no sense is answered without a word.",
        "the checks of the arguments, on every rank, before any collective";
    RefusedWithoutWords, "refused-without-words", Refusal,
        "Something is refused and nobody says why.",
        "the message of the error";
    GoodInputRefused, "good-input-refused", Refusal,
        "Input that is to be answered is refused.",
        "the condition of the check that the message is of";
    OneRankRefuses, "one-rank-refuses", Refusal,
        "Some ranks refuse what others answer.",
        "whether a check sees what only one rank has";
}
