//! The catalogue asks what it says it asks.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashSet;

use fixtures::sharding::Shard;
use fixtures::{AttentionCase, Case, Content, Dtype, Extras, Feature, Mask};
use ulysses_conformance::catalogue;

#[test]
fn names_are_distinct_and_give_back_their_cases() {
    let cases = catalogue::cases();
    let names: HashSet<String> = cases.iter().map(Case::to_string).collect();
    assert_eq!(names.len(), cases.len());
    for case in &cases {
        // Which it is only if the case makes sense.
        assert_eq!(&case.to_string().parse::<Case>().unwrap(), case);
    }
}

#[test]
fn no_two_sizes_of_a_case_are_the_same() {
    // A sequence of a few tokens has no sizes of its own.
    let cases = catalogue::attention();
    for case in cases.iter().filter(|case| case.sequence > 8) {
        let mut sizes = vec![case.sequence, case.head_size, case.query_heads];
        let shards = case.shards();
        // A shard as long as the others, or as the whole, is no dimension of its
        // own.
        let lengths: HashSet<usize> = shards.iter().map(Shard::len).collect();
        sizes.extend(
            lengths
                .into_iter()
                .filter(|&length| length != case.sequence),
        );
        sizes.extend(case.extras.cross);
        // Where values show weights there is a channel for each token.
        let value_size = case.extras.value_size;
        sizes.extend(value_size.filter(|_| case.content != Content::Onehot));
        let distinct: HashSet<_> = sizes.iter().collect();
        assert_eq!(distinct.len(), sizes.len(), "{case}: {sizes:?}");
        assert!(
            !sizes.contains(&case.kv_heads) || case.kv_heads == case.query_heads,
            "{case}"
        );
        assert!(!sizes.contains(&case.batch), "{case}");
    }
}

/// What a case asks beyond the plain one, but for its sizes.
fn part(case: &AttentionCase) -> String {
    let name = case.to_string();
    let (_, after) = name.split_once("-seed0").unwrap();
    let digits = |c: char| c.is_ascii_digit();
    after.split(digits).collect()
}

#[test]
fn every_feature_and_every_defect_is_asked_for_on_every_world() {
    let cases = catalogue::cases();
    for world in 1..=4 {
        let these = || cases.iter().filter(|case| case.world() == world);
        let features: HashSet<Feature> = these().flat_map(Case::features).collect();
        let missing: Vec<_> = Feature::ALL
            .into_iter()
            .filter(|feature| !features.contains(feature))
            .collect();
        use Feature::{
            BatchRaggedStream, EmptyRank, FewerQueryHeadsThanRanks, KvReplication, MeshReplicate,
            ModelReplicas, UnevenKvHeads, UnevenQueryHeads,
        };
        let due = match world {
            // What takes more than one rank.
            1 => vec![
                KvReplication,
                UnevenKvHeads,
                UnevenQueryHeads,
                FewerQueryHeadsThanRanks,
                EmptyRank,
                BatchRaggedStream,
                MeshReplicate,
                ModelReplicas,
            ],
            4 => vec![],
            _ => vec![FewerQueryHeadsThanRanks],
        };
        assert_eq!(missing, due, "on {world} ranks");
        let defect = |case: &Case| Some((case.profile(), case.defect()?));
        let defects: HashSet<_> = these().filter_map(defect).collect();
        assert_eq!(defects.len(), if world == 1 { 34 } else { 36 });
    }
}

#[test]
fn what_is_asked_beyond_meets_every_dtype() {
    let cases = catalogue::attention();
    let beyond = || cases.iter().filter(|case| !part(case).is_empty());
    for case in beyond().filter(|case| case.extras.defect.is_none() && case.world < 8) {
        let alike = |other: &&AttentionCase| part(other) == part(case) && other.mask == case.mask;
        let dtypes: HashSet<_> = beyond().filter(alike).map(|other| other.dtype).collect();
        // Dropped weights are not to be read from halves.
        let due = if case.extras.dropout.is_some() { 2 } else { 4 };
        let once = case.query_heads == 4;
        assert!(dtypes.len() == due || once, "{case}: {dtypes:?}");
    }
}

#[test]
fn every_world_and_pair_of_heads_meets_every_mask_dtype_batch_size_and_content() {
    let cases = catalogue::attention();
    for world in [1, 2, 3, 4] {
        for heads in [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (12, 3)] {
            let these: Vec<_> = cases
                .iter()
                .filter(|case| case.extras == Extras::default())
                .filter(|case| case.world == world && (case.query_heads, case.kv_heads) == heads)
                .collect();
            for mask in Mask::ALL {
                for dtype in Dtype::FLOATS {
                    assert!(
                        these
                            .iter()
                            .any(|case| case.mask == mask && case.dtype == dtype)
                    );
                }
            }
            let with = |f: &dyn Fn(&AttentionCase) -> bool| these.iter().any(|case| f(case));
            assert!(
                [1, 3]
                    .iter()
                    .all(|&batch| with(&|case| case.batch == batch))
            );
            assert!(
                [16, 64, 80]
                    .iter()
                    .all(|&size| with(&|case| case.head_size == size))
            );
            assert!(
                [Content::Gaussian, Content::Peaked]
                    .iter()
                    .all(|&content| with(&|case| case.content == content))
            );
        }
    }
}

#[test]
fn every_dtype_meets_every_head_size_batch_and_content_on_every_world() {
    let cases = catalogue::attention();
    for world in [1, 2, 3, 4] {
        for dtype in Dtype::FLOATS {
            let seen: HashSet<_> = cases
                .iter()
                .filter(|case| case.world == world && case.dtype == dtype)
                .map(|case| (case.head_size, case.batch, case.content))
                .collect();
            for head_size in [16, 64, 80] {
                assert!(
                    seen.iter().any(|&(size, ..)| size == head_size),
                    "{world} {dtype}"
                );
            }
            for (batch, content) in [
                (1, Content::Gaussian),
                (3, Content::Gaussian),
                (1, Content::Peaked),
                (3, Content::Peaked),
            ] {
                assert!(
                    seen.iter().any(|&(_, b, c)| (b, c) == (batch, content)),
                    "{world} {dtype} {batch} {content:?}"
                );
            }
        }
    }
}
