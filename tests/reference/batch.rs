//! A batch before and at the cut: positions, targets, padding, shards.
#![allow(clippy::unwrap_used, missing_docs)]

use proptest::prelude::*;
use rstest::rstest;
use tch::{Device, Kind, Tensor};
use ulysses::{Batch, IGNORE_INDEX, Shard, Sharding, Shift, document_ends, position_ids};

const I64: (Kind, Device) = (Kind::Int64, Device::Cpu);

fn words(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor.to_kind(Kind::Int64).flatten(0, -1)).unwrap()
}

fn rows<const N: usize>(rows: &[[i64; N]]) -> Tensor {
    Tensor::from_slice(rows.as_flattened()).view([rows.len() as i64, N as i64])
}

/// Ids that are their own places, 100 apart from row to row, as labels too.
fn batch(sequences: i64, tokens: i64) -> Batch {
    let first = Tensor::arange(sequences, I64).unsqueeze(1) * 100;
    let ids = first + Tensor::arange(tokens, I64);
    Batch::default()
        .with("labels", ids.copy())
        .with("input_ids", ids)
}

fn shards(batch: &Batch, sharding: Sharding, ranks: usize) -> Vec<Shard> {
    let shard = |rank| batch.shard(sharding, rank, ranks).unwrap();
    (0..ranks).map(shard).collect()
}

/// What an entry of all shards was before the cut.
fn join(shards: &[Shard], name: &str, dimension: i64) -> Tensor {
    let tokens = &shards[0].tokens;
    let parts: Vec<_> = shards
        .iter()
        .map(|shard| shard.get(name).unwrap())
        .collect();
    let held: Vec<i64> = (0..shards.len())
        .flat_map(|rank| tokens.places(rank).map(|place| place as i64))
        .collect();
    let (_, order) = Tensor::from_slice(&held).sort(0, false);
    Tensor::cat(&parts, dimension).index_select(dimension, &order)
}

#[test]
fn a_target_beyond_the_cut_is_not_lost() {
    let batch = batch(1, 8)
        .with_position_ids()
        .unwrap()
        .shift_labels(Shift::default(), IGNORE_INDEX)
        .unwrap();
    let shards = shards(&batch, Sharding::Contiguous, 2);
    let of = |rank: usize, name| words(shards[rank].get(name).unwrap());
    assert_eq!(of(0, "input_ids"), [0, 1, 2, 3]);
    assert_eq!(of(0, "shift_labels"), [1, 2, 3, 4]);
    assert_eq!(of(1, "shift_labels"), [5, 6, 7, IGNORE_INDEX]);
    assert_eq!(of(1, "position_ids"), [4, 5, 6, 7]);
    assert!(shards[0].get("labels").is_none());
}

#[test]
fn labels_are_shifted_once() {
    let shifted = batch(2, 4).shift_labels(Shift::default(), IGNORE_INDEX);
    let error = |batch: Batch| {
        let again = batch.shift_labels(Shift::default(), IGNORE_INDEX);
        again.unwrap_err().to_string()
    };
    let due = "`shift_labels` are there already: to shift again would make each token's target \
               the one after; shift labels once";
    let shifted = shifted.unwrap();
    let labels = shifted.get("shift_labels").unwrap().copy();
    assert_eq!(error(shifted), due);
    assert_eq!(error(batch(2, 4).with("shift_labels", labels)), due);
    let without = Batch::default().with("input_ids", Tensor::zeros([1, 4], I64));
    assert_eq!(
        error(without),
        "`labels` are missing; give each token's own id as its label, or ask for no targets"
    );
}

/// Rows of documents of 3, 1 and 4 tokens, and of 8.
#[rstest]
#[case::ends_within(Shift::WithinDocuments, true, [[1, 2, -7, -7, 5, 6, 7, -7], [101, 102, 103, 104, 105, 106, 107, -7]])]
#[case::restarts_within(Shift::WithinDocuments, false, [[1, 2, -7, -7, 5, 6, 7, -7], [101, 102, 103, 104, 105, 106, 107, -7]])]
#[case::across(Shift::AcrossDocuments, true, [[1, 2, 3, 4, 5, 6, 7, -7], [101, 102, 103, 104, 105, 106, 107, -7]])]
fn targets_across_the_end_of_a_document(
    #[case] shift: Shift,
    #[case] told: bool,
    #[case] due: [[i64; 8]; 2],
) {
    let ends = document_ends(&[vec![3, 1, 4], vec![8]]);
    assert_eq!(ends, [vec![3, 4, 8], vec![8]]);
    let batch = match told {
        true => batch(2, 8).with_document_ends(ends),
        false => batch(2, 8).with("position_ids", position_ids(&ends).unwrap()),
    };
    let batch = batch.shift_labels(shift, -7).unwrap();
    assert_eq!(batch.get("shift_labels").unwrap(), &rows(&due));
}

#[test]
fn positions_count_from_the_first_token_of_a_document() {
    let ends = document_ends(&[vec![3, 1, 0, 4], vec![8]]);
    let packed = batch(2, 8).with_document_ends(ends);
    let packed = packed.with_position_ids().unwrap();
    let due = rows(&[[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]);
    assert_eq!(packed.get("position_ids").unwrap(), &due);
    let again = packed.with_position_ids().unwrap_err();
    assert_eq!(again.argument(), Some("position_ids"));
    let plain = batch(3, 5).with_position_ids().unwrap();
    let due = Tensor::arange(5, I64).expand([3, 5], false);
    assert_eq!(plain.get("position_ids").unwrap(), &due);
}

#[test]
fn padding_is_no_target_no_document_and_masked() {
    let three =
        Tensor::arange(5, I64).expand([3, 2, 5], false) * rows(&[[2], [3], [4]]).unsqueeze(2);
    let padded = batch(2, 5)
        .with_document_ends(vec![vec![2, 5], vec![5]])
        .with_position_ids()
        .unwrap()
        .with(
            "attention_mask",
            Tensor::ones([2, 5], (Kind::Bool, Device::Cpu)),
        )
        .with(
            "weights",
            Tensor::ones([2, 5, 3], (Kind::Float, Device::Cpu)),
        )
        .with_tokens_at("of_three", three, 2)
        .with_whole("step", Tensor::from(7i64))
        .pad(4, 9, -1)
        .unwrap();
    assert_eq!(padded.extent().unwrap(), (2, 8));
    let of = |name| words(&padded.get(name).unwrap().narrow(-1, 5, 3));
    assert_eq!(of("input_ids"), [9; 6]);
    assert_eq!(of("labels"), [-1; 6]);
    assert_eq!(of("attention_mask"), [0; 6]);
    // On from 2, the third token of the second document, and from 4.
    assert_eq!(of("position_ids"), [3, 4, 5, 5, 6, 7]);
    assert_eq!(padded.document_ends().unwrap(), [vec![2, 8], vec![8]]);
    assert_eq!(
        words(&padded.get("weights").unwrap().narrow(1, 5, 3)),
        [0; 18]
    );
    assert_eq!(padded.get("weights").unwrap().size(), [2, 8, 3]);
    assert_eq!(padded.get("of_three").unwrap().size(), [3, 2, 8]);
    assert_eq!(words(padded.get("step").unwrap()), [7]);
    // The last real token has no target, whenever labels are shifted.
    let targets = padded.shift_labels(Shift::default(), -1).unwrap();
    let targets = targets.get("shift_labels").unwrap().narrow(1, 4, 4);
    assert_eq!(words(&targets), [-1; 8]);
    // Nothing to do.
    assert_eq!(batch(2, 8).pad(4, 9, -1).unwrap().extent().unwrap(), (2, 8));
}

#[test]
fn positions_of_three_components_are_cut_and_padded_at_their_last_dimension() {
    let ids = Tensor::arange(2 * 3 * 5, I64).view([3, 2, 5]);
    let batch = batch(2, 5)
        .with_tokens_at("position_ids", ids.copy(), 2)
        .shift_labels(Shift::default(), IGNORE_INDEX)
        .unwrap();
    let cut = shards(&batch, Sharding::Zigzag, 2);
    assert_eq!(join(&cut, "position_ids", 2), ids);
    let padded = batch.pad(6, 0, 0).unwrap();
    let last = padded.get("position_ids").unwrap().select(2, 5);
    assert_eq!(last, ids.select(2, 4) + 1);
}

proptest! {
    /// Of every entry, whatever the sharding, length and dtype.
    #[test]
    fn the_shards_together_are_the_whole(
        (sequences, tokens, ranks) in (1i64..4, 1i64..20, 1usize..7),
        sharding in prop::sample::select(vec![
            Sharding::Contiguous, Sharding::Zigzag, Sharding::Striped,
        ]),
        kind in prop::sample::select(vec![
            Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16, Kind::Int, Kind::Bool,
        ]),
    ) {
        let features = Tensor::arange(sequences * tokens * 2, I64).remainder(2)
            .view([sequences, tokens, 2]).to_kind(kind);
        let batch = batch(sequences, tokens)
            .with("features", features.copy())
            .with_whole("temperature", Tensor::from(0.5))
            .with_position_ids().unwrap()
            .shift_labels(Shift::default(), IGNORE_INDEX).unwrap();
        let shards = shards(&batch, sharding, ranks);
        for name in ["input_ids", "position_ids", "shift_labels", "features"] {
            let whole = batch.get(name).unwrap();
            prop_assert_eq!(&join(&shards, name, 1), whole);
            prop_assert_eq!(join(&shards, name, 1).kind(), whole.kind());
        }
        for shard in &shards {
            prop_assert_eq!(shard.get("temperature").unwrap(), &Tensor::from(0.5));
        }
        // Nobody holds more than one token more, of two runs two.
        let held = (0..ranks).map(|rank| shards[0].tokens.tokens(rank));
        let (least, most) = (held.clone().min().unwrap(), held.max().unwrap());
let most_more = if sharding == Sharding::Zigzag { 2 } else { 1 };
        prop_assert!(most - least <= most_more);
    }
}

#[rstest]
#[case::length("labels", batch(2, 8).with("labels", Tensor::zeros([2, 7], I64)),
    "`labels` has 2 sequences of 7 tokens in shape [2, 7] with tokens at 1, but `input_ids` has 2 \
     of 8; give all entries the same, or pass this one whole")]
#[case::sequences("position_ids", batch(2, 8).with("position_ids", Tensor::zeros([1, 8], I64)),
    "`position_ids` has 1 sequences of 8 tokens in shape [1, 8] with tokens at 1, but `input_ids` \
     has 2 of 8; give all entries the same, or pass this one whole")]
#[case::dtype("input_ids", batch(2, 8).with("input_ids", Tensor::zeros([2, 8], (Kind::Float, Device::Cpu))),
    "`input_ids` is Float; make it Int64")]
#[case::mask("attention_mask", batch(2, 8).with("attention_mask", Tensor::zeros([2, 1, 8, 8], I64)),
    "`attention_mask` has shape [2, 1, 8, 8]; give [B, S]")]
#[case::unknown("batch", batch(2, 8).with("weights", Tensor::zeros([8], I64)),
    "`batch` has an entry `weights` that has shape [8], without tokens at dimension 1; give it as \
     [B, S, ..], or pass it whole")]
#[case::rows("document_ends", batch(2, 8).with_document_ends(vec![vec![8]]),
    "`document_ends` are for 1 rows of 2; give them for every row")]
#[case::falling("document_ends", batch(1, 8).with_document_ends(vec![vec![5, 3, 8]]),
    "`document_ends` go down in row 0: [5, 3, 8]; give cumulative lengths")]
#[case::short("document_ends", batch(1, 8).with_document_ends(vec![vec![5, 7]]),
    "`document_ends` end with token 7 in row 0 of 8 tokens; let the last document end with the row")]
#[case::none("document_ends", batch(1, 8).with_document_ends(vec![vec![]]),
    "`document_ends` end nowhere in row 0 of 8 tokens; let the last document end with the row")]
#[case::nothing(
    "batch",
    Batch::default(),
    "`batch` has no entry with a value for each token; give it `input_ids` [B, S]"
)]
#[case::empty(
    "input_ids",
    batch(2, 0),
    "`input_ids` has 2 sequences of 0 tokens; give at least one token"
)]
fn what_does_not_fit_is_refused_by_name(
    #[case] argument: &str,
    #[case] batch: Batch,
    #[case] due: &str,
) {
    let error = batch.extent().unwrap_err();
    assert_eq!(error.to_string(), due);
    assert_eq!(error.argument(), Some(argument));
    // Wherever it is used.
    let refused = [
        batch.shard(Sharding::Contiguous, 0, 2).err(),
        batch.pad(3, 0, 0).err(),
    ];
    assert_eq!(refused, [Some(error.clone()), Some(error)]);
}

#[test]
fn a_cut_before_its_time_is_refused() {
    let cut = |batch: &Batch, rank, ranks| {
        let shard = batch.shard(Sharding::Contiguous, rank, ranks);
        shard.map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        cut(&batch(1, 8), 0, 2),
        "`labels` are to be cut before they are shifted, and the last token of each shard would \
         lose its target; call `shift_labels` first"
    );
    let shifted = batch(1, 8).shift_labels(Shift::default(), -100).unwrap();
    assert_eq!(
        cut(&shifted, 0, 2),
        "`position_ids` are missing, and made from a shard they would begin again on every rank; \
         call `with_position_ids` first"
    );
    let ready = shifted.with_position_ids().unwrap();
    assert_eq!(
        cut(&ready, 2, 2),
        "`rank` is 2, in a group of 2; count ranks from 0"
    );
    assert_eq!(
        cut(&ready, 0, 0),
        "`ranks` is 0; give the size of the group"
    );
    assert_eq!(
        ready.pad(0, 0, 0).unwrap_err().to_string(),
        "`pad_to_multiple_of` is 0; give the number of ranks"
    );
}
