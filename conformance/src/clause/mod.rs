//! The clauses of `SPEC.md`: what Ulysses sequence parallelism is, in sentences
//! that can turn out to be wrong.
//!
//! A test holds the list here and the one there together, word by word, and
//! sees to it that every clause has a case that tests it and a mistake that
//! breaks it.

mod cases;
mod mistakes;

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
