//! What the reference is said to cost is what it costs: counted by a
//! communicator, and read off tensors. And what others published comes out.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use approx::assert_relative_eq;
use rstest::rstest;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};
use ulysses::cost::{
    Model, Shares,
    activations::{self, Tiles},
    deepspeed::DeepSpeedAttention,
    flops::{self, Rule, Work},
    memory::{self, Limit, Phase, Training},
    published,
    traffic::AttentionTraffic,
};
use ulysses::{
    Call, CountingCommunicator, Documents, Exchange, HeadPartition, Mask, Options, Sharding,
    TokenPartition, Traffic, UlyssesAttention, checkpoint,
};
use world::{leaf, noise, on_ranks};

const BATCH: i64 = 2;

fn add(a: Traffic, b: Traffic) -> Traffic {
    Traffic {
        all_to_all_calls: a.all_to_all_calls + b.all_to_all_calls,
        all_to_all_bytes: a.all_to_all_bytes + b.all_to_all_bytes,
        off_rank_bytes: a.off_rank_bytes + b.off_rank_bytes,
        all_gather_calls: a.all_gather_calls + b.all_gather_calls,
        all_gather_bytes: a.all_gather_bytes + b.all_gather_bytes,
    }
}

fn bytes(tensor: &Tensor) -> u128 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u128
}

#[rstest]
#[case::alone(&[3], (4, 2), 8)]
#[case::multi_head(&[3, 3], (4, 4), 8)]
#[case::multi_head(&[3; 4], (8, 8), 8)]
#[case::grouped(&[3, 3], (8, 4), 8)]
#[case::replicated(&[3; 4], (8, 2), 8)]
#[case::multi_query(&[3; 3], (6, 1), 8)]
#[case::uneven_heads(&[3, 3], (7, 7), 8)]
#[case::uneven_heads(&[2; 4], (6, 3), 8)]
#[case::replicated_in_part(&[2, 3, 4], (8, 4), 8)]
#[case::uneven_tokens(&[5, 0, 2], (3, 3), 8)]
#[case::uneven_all(&[2, 1, 3, 4], (6, 3), 8)]
#[case::other_value_size(&[2, 3], (4, 2), 5)]
fn traffic_is_what_the_counter_shows(
    #[case] tokens: &[u64],
    #[case] (query_heads, kv_heads): (u64, u64),
    #[case] value_size: i64,
    #[values(Kind::Float, Kind::BFloat16)] kind: Kind,
    #[values(false, true)] has_positions: bool,
) {
    let ranks = tokens.len();
    let heads = HeadPartition::new(query_heads as usize, kv_heads as usize, ranks).unwrap();
    let shares = Shares::new(BATCH as u64, tokens.to_vec(), heads).unwrap();
    let element_bytes = kind.elt_size_in_bytes() as u64;
    let cost = AttentionTraffic::new(&shares, 8, value_size as u64, element_bytes).unwrap();
    on_ranks(ranks, |communicator| {
        let rank = communicator.rank();
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let options = Options {
            uneven_heads: true,
            ..Options::default()
        };
        let attention = UlyssesAttention::new(counter.clone(), options);
        let own = tokens[rank] as i64;
        let of = |seed, heads, size| leaf(&noise(seed, [BATCH, own, heads, size], kind));
        let query = of(1, query_heads as i64, 8);
        let (key, value) = (
            of(2, kv_heads as i64, 8),
            of(3, kv_heads as i64, value_size),
        );
        let first: u64 = tokens[..rank].iter().sum();
        let positions = Tensor::arange(own, (Kind::Int64, Device::Cpu)) + first as i64;
        let positions = positions.expand([BATCH, own], false);
        let call = Call {
            position_ids: Some(&positions),
            documents: has_positions.then_some(Documents::FromPositions),
            ..Call::default()
        };
        let output = attention.forward_with(&query, &key, &value, &call).unwrap();
        let mut due = cost.forward(rank).unwrap();
        if has_positions {
            due = add(due, cost.positions(1).unwrap());
        }
        assert_eq!(counter.traffic(), due, "forward");
        counter.reset();
        output.sum(kind).backward();
        assert_eq!(counter.traffic(), cost.backward(rank).unwrap(), "backward");
    });
}

/// Three layers of exchanges, with checkpoints and without.
#[rstest]
fn a_step_is_what_the_counter_shows(#[values(false, true)] is_checkpointed: bool) {
    const LAYERS: u64 = 3;
    let shares = Shares::even(1, 7, (4, 2), 3).unwrap();
    assert_eq!(shares.tokens(), [3, 2, 2]);
    let cost = AttentionTraffic::new(&shares, 8, 8, 4).unwrap();
    on_ranks(3, |communicator| {
        let rank = communicator.rank();
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let own = shares.tokens()[rank] as i64;
        let mut x = leaf(&noise(1, [1, own, 4, 8], Kind::Float));
        for _ in 0..LAYERS {
            let options = Options {
                uneven_heads: true,
                ..Options::default()
            };
            let attention = UlyssesAttention::new(counter.clone(), options);
            let layer = move |inputs: &[Tensor]| {
                let kv = inputs[0].narrow(2, 0, 2);
                Ok(vec![attention.forward(&inputs[0], &kv, &kv)?])
            };
            x = match is_checkpointed {
                true => checkpoint(layer, &[&x]).unwrap().remove(0),
                false => layer(&[x]).unwrap().remove(0),
            };
        }
        x.sum(Kind::Float).backward();
        let due = cost.step(rank, LAYERS, is_checkpointed).unwrap();
        assert_eq!(counter.traffic(), due);
    });
}

/// Four models worked out by hand, of each what one layer hands over and what
/// of it leaves, what leaves in a step without and with checkpoints, and what
/// position ids arrive.
#[rstest]
#[case::a([2, 1024, 8, 8, 64, 4, 4], 2, 1, [262_144, 262_144], (4_194_304, 3_145_728), [12_582_912, 18_874_368], 12_288)]
#[case::b([1, 4096, 8, 2, 64, 4, 2], 4, 2, [262_144, 131_072], (3_145_728, 2_359_296), [18_874_368, 28_311_552], 24_576)]
#[case::c([1, 131_072, 32, 8, 128, 8, 2], 32, 1, [16_777_216, 4_194_304], (335_544_320, 293_601_280), [18_790_481_920, 28_185_722_880], 917_504)]
#[case::d([1, 15_500_000, 32, 8, 128, 32, 2], 32, 4, [124_000_000, 124_000_000], (15_872_000_000, 15_376_000_000), [984_064_000_000, 1_476_096_000_000], 120_125_000)]
fn deepspeed_moves_the_bytes_that_are_worked_out_by_hand(
    #[case] sizes: [u64; 7],
    #[case] layers: u64,
    #[case] kv_copies: u64,
    #[case] blocks: [u128; 2],
    #[case] (handed_over, off_rank): (u128, u128),
    #[case] steps: [u128; 2],
    #[case] positions: u128,
) {
    let [
        batch,
        sequence,
        query_heads,
        kv_heads,
        head_size,
        ranks,
        element_bytes,
    ] = sizes;
    let attention = DeepSpeedAttention {
        batch,
        sequence,
        query_heads,
        kv_heads,
        head_size,
        ranks,
        element_bytes,
    };
    let traffic = attention.traffic().unwrap();
    assert_eq!(traffic.kv_copies, kv_copies);
    assert_eq!([traffic.query_block, traffic.kv_block], blocks);
    assert_eq!(traffic.handed_over, handed_over);
    assert_eq!(traffic.off_rank, off_rank);
    let step = |is_checkpointed| traffic.off_rank_of_step(layers, is_checkpointed).unwrap();
    assert_eq!([step(false), step(true)], steps);
    assert_eq!(traffic.positions_received, positions);
    // A call of D has more bytes than an int can displace, though no block has.
    let is_long = sequence == 15_500_000;
    assert_eq!(traffic.largest_call > i32::MAX as u128, is_long);

    // The reference hands over the same, in fewer calls.
    let shares = Shares::even(batch, sequence, (query_heads, kv_heads), ranks).unwrap();
    let own = AttentionTraffic::new(&shares, head_size, head_size, element_bytes).unwrap();
    for traffic in [own.forward(0).unwrap(), own.backward(0).unwrap()] {
        assert_eq!(u128::from(traffic.all_to_all_bytes), handed_over);
        assert_eq!(u128::from(traffic.off_rank_bytes), off_rank);
    }
    let of_step = |is_checkpointed| own.step(0, layers, is_checkpointed).unwrap().off_rank_bytes;
    assert_eq!([of_step(false), of_step(true)].map(u128::from), steps);
    let positions_of_one = own.positions(1).unwrap().all_gather_bytes;
    assert_eq!(u128::from(positions_of_one * (ranks - 1)), positions);
}

#[rstest]
#[case::tokens(|a: &mut DeepSpeedAttention| a.sequence = 13, "`sequence` has 13 tokens")]
#[case::query_heads(|a: &mut DeepSpeedAttention| a.query_heads = 6, "`query_heads` has 6 heads")]
#[case::kv_heads(|a: &mut DeepSpeedAttention| a.kv_heads = 3, "`kv_heads` has 3 heads")]
#[case::ranks(|a: &mut DeepSpeedAttention| a.ranks = 0, "number of ranks of 0")]
#[case::absurd(|a: &mut DeepSpeedAttention| a.sequence = 1 << 63, "beyond 2^100")]
fn what_deepspeed_cannot_cut_is_refused(
    #[case] spoil: fn(&mut DeepSpeedAttention),
    #[case] reason: &str,
) {
    let mut attention = DeepSpeedAttention {
        batch: 1 << 40,
        sequence: 12,
        query_heads: 8,
        kv_heads: 8,
        head_size: 8,
        ranks: 4,
        element_bytes: 2,
    };
    assert!(attention.traffic().is_ok());
    spoil(&mut attention);
    let error = attention.traffic().unwrap_err().to_string();
    assert!(error.contains(reason), "{error}");
}

/// What one rank computes forward and backward, by counting pairs of a query
/// and a key that it sees one by one.
#[rstest]
#[case::full(Mask::Full)]
#[case::causal(Mask::Causal)]
fn operations_are_those_of_each_pair_and_each_weight(#[case] mask: Mask) {
    let model = small_model();
    let shares = Shares::even(2, 7, (4, 2), 3).unwrap();
    let plain = Work {
        mask,
        is_checkpointed: false,
        has_tiled_mlp: false,
        has_tiled_loss: false,
        is_attention_fused: false,
    };
    let (heads, tokens) = ([2, 1, 1], [3, 2, 2]);
    for rank in 0..3 {
        let of = |work| flops::step(&model, &shares, rank, &work).unwrap();
        let pairs = (0..7 * 7).filter(|pair| mask == Mask::Full || pair % 7 <= pair / 7);
        // A multiplication and an addition for each channel of a score, and
        // again for each channel of a value.
        let attention = 2 * 3 * heads[rank] * pairs.count() as u128 * 4 * 5;
        let weights = [
            3 * (6 * 20 + 6 * 10 + 6 * 10 + 20 * 6),
            3 * 3 * 6 * 9,
            6 * 11,
        ];
        let [projections, mlp, logits] = weights.map(|weights| 2 * 2 * tokens[rank] * weights);
        let step = of(plain);
        assert_eq!(step.forward.attention, attention);
        assert_eq!(step.forward.projections, projections);
        assert_eq!(step.forward.mlp, mlp);
        assert_eq!(step.forward.logits, logits);
        assert_eq!(step.recompute.total(), 0);
        assert_eq!(step.backward.total(), 2 * step.forward.total());

        let step = of(Work {
            is_checkpointed: true,
            has_tiled_mlp: true,
            has_tiled_loss: true,
            is_attention_fused: true,
            ..plain
        });
        // The MLP runs three times, and backward is two more: five quarters
        // of what checkpointing alone makes of it.
        assert_eq!(step.recompute.mlp, 2 * mlp);
        assert_eq!(step.recompute.logits, logits);
        assert_eq!(step.recompute.projections, projections);
        assert_eq!(2 * step.recompute.attention, 3 * attention);
    }
}

fn small_model() -> Model {
    Model {
        layers: 3,
        hidden: 6,
        query_heads: 4,
        kv_heads: 2,
        head_size: 5,
        ffn: 9,
        mlp_matrices: 3,
        vocabulary: 11,
        is_tied: false,
        small_parameters: 12,
    }
}

/// Forward attention of one layer of the models above.
#[rstest]
#[case::a((2, 1024), (8, 8), 64, 4, 1_073_741_824, 537_395_200)]
#[case::b((1, 4096), (8, 2), 64, 4, 8_589_934_592, 4_296_015_872)]
#[case::c((1, 131_072), (32, 8), 128, 8, 35_184_372_088_832, 17_592_320_262_144)]
fn attention_of_models_is_worked_out_by_hand(
    #[case] (batch, sequence): (u64, u64),
    #[case] heads: (u64, u64),
    #[case] head_size: u64,
    #[case] ranks: u64,
    #[case] full: u128,
    #[case] causal: u128,
) {
    let shares = Shares::even(batch, sequence, heads, ranks).unwrap();
    let of = |mask| flops::attention(&shares, 0, (head_size, head_size), mask).unwrap();
    assert_eq!([of(Mask::Full), of(Mask::Causal)], [full, causal]);
}

/// The bytes of tensors are those of tensors that are really made, by real
/// exchanges, products and checkpoints.
#[rstest]
fn activations_are_tensors_of_that_many_bytes(
    #[values(Kind::Float, Kind::BFloat16)] kind: Kind,
    #[values((4, 4), (4, 2), (4, 1))] heads: (u64, u64),
    #[values(1, 3)] tiles: u64,
) {
    const TOKENS: u64 = 7;
    let model = Model {
        query_heads: heads.0,
        kv_heads: heads.1,
        ..small_model()
    };
    let shares = Shares::even(2, TOKENS, heads, 3).unwrap();
    let element_bytes = kind.elt_size_in_bytes() as u64;
    on_ranks(3, |communicator| {
        let rank = communicator.rank();
        let own = shares.tokens()[rank] as i64;
        let both = Tiles {
            mlp: tiles,
            loss: tiles,
        };
        let due = activations::of(&model, &shares, rank, element_bytes, both).unwrap();
        let tokens = [3, 2, 2];
        let tokens = TokenPartition::new(Sharding::Contiguous, &tokens).unwrap();
        let exchange = Exchange::new(communicator, tokens, *shares.heads()).unwrap();
        let of = |heads: u64| noise(1, [2, own, heads as i64, 5], kind);
        let (query, kv) = (of(heads.0), of(heads.1));
        assert_eq!(bytes(&query), due.query_in_sequence);
        let (query, key, value) = exchange.sequence_to_heads(&query, &kv, &kv).unwrap();
        assert_eq!(bytes(&query), due.query_in_heads);
        assert_eq!([bytes(&key), bytes(&value)], [due.kv_in_heads; 2]);
        let output = exchange.heads_to_sequence(&query).unwrap();
        assert_eq!(bytes(&output), due.query_in_sequence);

        // The largest tile is the first.
        let hidden = noise(2, [2, own, 1, 6], kind).squeeze_dim(2);
        let tile = hidden.tensor_split(tiles as i64, 1).remove(0);
        let gate = tile.matmul(&Tensor::ones([6, 9], (kind, Device::Cpu)));
        assert_eq!(bytes(&gate), due.mlp_tile);
        let head = Tensor::ones([6, 11], (Kind::Float, Device::Cpu));
        let logits = tile.to_kind(Kind::Float).matmul(&head);
        assert_eq!(bytes(&logits), due.logits_tile);

        let kept = Arc::new(Mutex::new(0));
        let mut stream = leaf(&hidden);
        for _ in 0..model.layers {
            let kept = Arc::clone(&kept);
            let layer = move |inputs: &[Tensor]| {
                *kept.lock().unwrap() += inputs.iter().map(bytes).sum::<u128>();
                Ok(vec![&inputs[0] * 2.0])
            };
            stream = checkpoint(layer, &[&stream]).unwrap().remove(0);
        }
        assert_eq!(*kept.lock().unwrap(), due.checkpoints);
        let positions = Tensor::zeros([2, TOKENS as i64], (Kind::Int64, Device::Cpu));
        assert_eq!(bytes(&positions), due.positions);
    });
}

/// The parameters that the authors of the models count.
#[rstest]
#[case("llama-3.1-8b", 8_030_261_248)]
#[case("Llama-3.1-70B", 70_553_706_496)]
#[case("Qwen3-32B", 32_762_123_264)]
fn models_have_the_parameters_they_are_published_with(#[case] name: &str, #[case] count: u128) {
    assert_eq!(Model::named(name).unwrap().parameters().unwrap(), count);
}

#[test]
fn published_throughputs_come_out() {
    let rows = published::throughputs();
    let exact: Vec<_> = rows.iter().filter(|row| row.is_exact()).collect();
    assert_eq!((rows.len(), exact.len()), (17, 12));
    for row in exact {
        let ratio = row.predicted().unwrap() / row.published;
        assert_relative_eq!(ratio, 1.0, epsilon = 0.015);
        if row.rule == Rule::Ulysses {
            assert_relative_eq!(ratio, 1.0, epsilon = 0.003);
        }
    }
}

#[test]
fn published_lengths_come_out() {
    let rows = published::lengths();
    let ratio = |row: &published::LengthRow| {
        let (sequence, _) = row.predicted().unwrap();
        sequence as f64 / row.published as f64
    };
    let (llama_8b, others): (Vec<_>, Vec<_>) =
        rows.iter().partition(|row| row.model == "Llama-3.1-8B");
    assert_eq!((llama_8b.len(), others.len()), (14, 9));
    for row in llama_8b {
        assert_relative_eq!(ratio(row), 1.0, epsilon = 0.2);
    }
    for row in others {
        assert!(ratio(row) > 1.0, "{} {}", row.model, row.what);
    }
    let limit = |model: &str, what: &str| {
        let row = rows
            .iter()
            .find(|row| (row.model, row.what) == (model, what));
        row.unwrap().predicted().unwrap().1
    };
    assert_eq!(
        limit("Llama-3.1-8B", "baseline, 8 GPUs"),
        Limit::Gpu(Phase::Logits)
    );
    assert_eq!(
        limit("Llama-3.1-8B", "SP 8 + offload"),
        Limit::Gpu(Phase::Mlp)
    );
    assert_eq!(
        limit("Llama-3.1-8B", "all, 8 GPUs"),
        Limit::Gpu(Phase::Attention)
    );
    assert_eq!(limit("Llama-3.1-8B", "all, 1 GPU"), Limit::Index);
    assert_eq!(limit("Llama-3.1-70B", "all, 16 GPUs"), Limit::Host);
}

#[test]
fn published_readings_and_sizes_come_out() {
    for row in published::readings() {
        let ratio = row.predicted().unwrap() / row.published;
        assert_relative_eq!(ratio, 1.0, epsilon = 0.12);
    }
    for row in published::sizes().unwrap() {
        // As far as digits are printed, cut off rather than rounded.
        assert_relative_eq!(row.predicted / row.published, 1.0, epsilon = 0.005);
    }
}

/// What fits by one function is what is used up by the other.
#[test]
fn the_longest_sequence_fills_the_gpu() {
    for row in published::lengths() {
        let (sequence, limit) = row.predicted().unwrap();
        let model = Model::named(row.model).unwrap();
        let of = |sequence| memory::estimate(&model, &row.training, sequence).unwrap();
        let (fits, beyond) = (of(sequence), of(sequence + row.training.sequence_parallel));
        assert!(fits.total() <= row.training.gpu_gib, "{}", row.what);
        if let Limit::Gpu(phase) = limit {
            assert!(beyond.total() > row.training.gpu_gib, "{}", row.what);
            assert_eq!(fits.phase, phase);
        }
    }
}

#[test]
fn a_model_that_does_not_fit_has_no_sequence() {
    let training = Training {
        offloads_optimizer: false,
        ..published::lengths()[1].training
    };
    let model = Model::named("Llama-3.1-70B").unwrap();
    // 18 bytes for each of 70 billion parameters, on 8 GPUs.
    assert_eq!(memory::longest_sequence(&model, &training).unwrap().0, 0);
}

#[test]
fn what_cannot_be_is_refused() {
    let refusal = |error: ulysses::Error| error.to_string();
    assert!(refusal(Shares::even(1, 8, (0, 0), 2).unwrap_err()).contains("has 0 heads"));
    assert!(refusal(Shares::even(1, 8, (4, 4), 0).unwrap_err()).contains("0 ranks"));
    assert!(refusal(Shares::even(0, 8, (4, 4), 2).unwrap_err()).contains("batch of 0"));
    assert!(refusal(Shares::even(1, 0, (4, 4), 2).unwrap_err()).contains("length of 0"));
    assert!(refusal(Shares::even(1, 8, (4, 4), 8).unwrap_err()).contains("fewer than the 8 ranks"));
    let heads = HeadPartition::new(4, 4, 2).unwrap();
    assert!(refusal(Shares::new(1, vec![1], heads).unwrap_err()).contains("for 1 ranks"));
    let overfull = Shares::new(1, vec![u64::MAX, 1], heads).unwrap_err();
    assert!(refusal(overfull).contains("more than 2^64"));

    let absurd = Shares::even(1, 8, (1 << 40, 1), 2).unwrap_err();
    assert!(refusal(absurd).contains("more than 2^32"));

    let shares = Shares::even(1, u64::MAX, (4, 4), 2).unwrap();
    assert!(
        refusal(AttentionTraffic::new(&shares, 0, 8, 4).unwrap_err()).contains("head size of 0")
    );
    let traffic = AttentionTraffic::new(&shares, 8, 8, 4).unwrap();
    assert!(refusal(traffic.forward(0).unwrap_err()).contains("2^62"));
    assert!(refusal(traffic.forward(2).unwrap_err()).contains("is 2 of 2"));
    let work = Work {
        mask: Mask::Full,
        is_checkpointed: true,
        has_tiled_mlp: false,
        has_tiled_loss: false,
        is_attention_fused: false,
    };
    let model = small_model();
    assert!(refusal(flops::step(&model, &shares, 0, &work).unwrap_err()).contains("2^100"));
    let without_heads = Model {
        query_heads: 0,
        ..model
    };
    assert!(refusal(without_heads.parameters().unwrap_err()).contains("query heads of 0"));
    let error = Rule::Alst.of_all(&model, 1, u64::MAX).unwrap_err();
    assert!(refusal(error).contains("2^100"));
    let few = Shares::even(1, 8, (4, 4), 2).unwrap();
    let none = Tiles { mlp: 0, loss: 1 };
    assert!(refusal(activations::of(&model, &few, 0, 4, none).unwrap_err()).contains("tiles"));
    let training = Training {
        world: 0,
        ..published::lengths()[0].training
    };
    let error = memory::longest_sequence(&model, &training).unwrap_err();
    assert!(refusal(error).contains("number of ranks of 0"));
    let training = Training {
        world: 6,
        sequence_parallel: 4,
        ..training
    };
    let error = memory::estimate(&model, &training, 8).unwrap_err();
    assert!(refusal(error).contains("groups of 4 do not divide"));
}
