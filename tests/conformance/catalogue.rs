//! The catalogue asks what it says it asks.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashSet;

use fixtures::{Case, Content, Dtype, Mask, sharding};
use ulysses_conformance::catalogue;

#[test]
fn names_are_distinct_and_give_back_their_cases() {
    let cases = catalogue::cases();
    let names: HashSet<String> = cases.iter().map(Case::to_string).collect();
    assert_eq!(names.len(), cases.len());
    for case in &cases {
        assert_eq!(&case.to_string().parse::<Case>().unwrap(), case);
    }
}

#[test]
fn no_two_sizes_of_a_case_are_the_same() {
    for case in catalogue::cases() {
        let mut sizes = vec![case.sequence, case.head_size, case.query_heads];
        sizes.extend(
            sharding::contiguous(case.sequence, case.world)
                .iter()
                .map(ExactSizeIterator::len)
                // A shard as long as the others, or as the whole, is no
                // dimension of its own.
                .collect::<HashSet<_>>()
                .into_iter()
                .filter(|&length| length != case.sequence),
        );
        let distinct: HashSet<_> = sizes.iter().collect();
        assert_eq!(distinct.len(), sizes.len(), "{case}: {sizes:?}");
        assert!(
            !sizes.contains(&case.kv_heads) || case.kv_heads == case.query_heads,
            "{case}"
        );
        assert!(!sizes.contains(&case.batch), "{case}");
    }
}

#[test]
fn every_world_and_pair_of_heads_meets_every_mask_dtype_batch_size_and_content() {
    let cases = catalogue::cases();
    for world in [1, 2, 3, 4] {
        for heads in [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (12, 3)] {
            let these: Vec<_> = cases
                .iter()
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
            let with = |f: &dyn Fn(&Case) -> bool| these.iter().any(|case| f(case));
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
                Content::ALL
                    .iter()
                    .all(|&content| with(&|case| case.content == content))
            );
        }
    }
}

#[test]
fn every_dtype_meets_every_head_size_batch_and_content_on_every_world() {
    let cases = catalogue::cases();
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
