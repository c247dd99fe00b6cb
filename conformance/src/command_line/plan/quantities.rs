//! All that a plan tells of one length, as a list of named numbers.

use serde::Serialize;
use ulysses::cost::activations::{self, Tiles, deepspeed_mlp_tiles};
use ulysses::cost::deepspeed::DeepSpeedAttention;
use ulysses::cost::flops::{self, Flops, Rule, Work, tera_per_second};
use ulysses::cost::memory::{self, Limit, Phase, Training};
use ulysses::cost::traffic::AttentionTraffic;
use ulysses::cost::{Model, Shares};
use ulysses::{Mask, Result};

use fixtures::Dtype;

use super::{Arguments, Offload, Tiling, grouped};

/// A named number.
#[derive(Debug, Serialize)]
pub(super) struct Quantity {
    pub(super) section: &'static str,
    name: &'static str,
    unit: &'static str,
    value: Value,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Value {
    Count(u128),
    Real(f64),
    Words(String),
}

impl Quantity {
    pub(super) fn is_like(&self, other: &Quantity) -> bool {
        (self.section, self.name) == (other.section, other.name)
    }

    /// The name with the unit.
    pub(super) fn named(&self) -> String {
        match self.unit {
            "" => self.name.to_owned(),
            unit => format!("{}, {unit}", self.name),
        }
    }

    pub(super) fn shown(&self) -> String {
        match &self.value {
            Value::Count(count) => grouped(*count),
            Value::Real(real) => format!("{real:.2}"),
            Value::Words(words) => words.clone(),
        }
    }
}

/// Quantities of one section.
struct Section(&'static str, Vec<Quantity>);

impl Section {
    fn add(&mut self, name: &'static str, unit: &'static str, value: Value) {
        self.1.push(Quantity {
            section: self.0,
            name,
            unit,
            value,
        });
    }

    fn bytes(&mut self, name: &'static str, bytes: impl Into<u128>) {
        self.add(name, "B", Value::Count(bytes.into()));
    }

    fn count(&mut self, name: &'static str, count: impl Into<u128>) {
        self.add(name, "", Value::Count(count.into()));
    }

    fn real(&mut self, name: &'static str, unit: &'static str, real: f64) {
        self.add(name, unit, Value::Real(real));
    }

    fn words(&mut self, name: &'static str, words: impl Into<String>) {
        self.add(name, "", Value::Words(words.into()));
    }
}

/// What is told of a model and a length.
pub(super) fn quantities(
    arguments: &Arguments,
    model: &Model,
    sequence: u64,
) -> Result<Vec<Quantity>> {
    let heads = (model.query_heads, model.kv_heads);
    let shares = Shares::even(arguments.batch, sequence, heads, arguments.sp)?;
    let parts = [
        exchanges(arguments, model, &shares)?,
        deepspeed(arguments, model, sequence),
        operations(arguments, model, &shares)?,
        tensors(arguments, model, &shares)?,
        estimate(arguments, model, sequence)?,
    ];
    Ok(parts.into_iter().flat_map(|section| section.1).collect())
}

fn element_bytes(arguments: &Arguments) -> u64 {
    arguments.dtype.size() as u64
}

fn exchanges(arguments: &Arguments, model: &Model, shares: &Shares) -> Result<Section> {
    let mut section = Section("exchanges of a rank, exact", Vec::new());
    let size = model.head_size;
    let traffic = AttentionTraffic::new(shares, size, size, element_bytes(arguments))?;
    let (forward, backward) = (
        traffic.forward(arguments.rank)?,
        traffic.backward(arguments.rank)?,
    );
    let step = traffic.step(arguments.rank, model.layers, !arguments.no_checkpoints)?;
    section.bytes("layer forward, handed over", forward.all_to_all_bytes);
    section.bytes("layer forward, leaves the rank", forward.off_rank_bytes);
    section.bytes("layer backward, handed over", backward.all_to_all_bytes);
    section.bytes("layer backward, leaves the rank", backward.off_rank_bytes);
    section.bytes("step, handed over", step.all_to_all_bytes);
    section.bytes("step, leaves the rank", step.off_rank_bytes);
    section.count("step, all-to-alls", step.all_to_all_calls);
    section.bytes("step, gathers to agree on calls", step.all_gather_bytes);
    let positions = traffic.positions(1)?.all_gather_bytes;
    section.bytes("position ids of a forward that reads them", positions);
    let others = shares.ranks() as u128 - 1;
    section.bytes(
        "position ids that then arrive",
        u128::from(positions) * others,
    );
    Ok(section)
}

fn deepspeed(arguments: &Arguments, model: &Model, sequence: u64) -> Section {
    let mut section = Section("exchanges of a rank in DeepSpeed", Vec::new());
    let attention = DeepSpeedAttention {
        batch: arguments.batch,
        sequence,
        query_heads: model.query_heads,
        kv_heads: model.kv_heads,
        head_size: model.head_size,
        ranks: arguments.sp,
        element_bytes: element_bytes(arguments),
    };
    let told = attention.traffic().and_then(|traffic| {
        let is_checkpointed = !arguments.no_checkpoints;
        Ok([
            traffic.handed_over,
            traffic.off_rank,
            traffic.off_rank_of_step(model.layers, is_checkpointed)?,
            traffic.largest_call,
            traffic.positions_received,
        ])
    });
    let names = [
        "layer, one direction, handed over",
        "layer, one direction, leaves the rank",
        "step, leaves the rank",
        "largest call",
        "position ids that arrive in each forward",
    ];
    for (place, name) in names.into_iter().enumerate() {
        match &told {
            Ok(bytes) => section.bytes(name, bytes[place]),
            Err(_) => section.add(name, "B", Value::Words("refused".to_owned())),
        }
    }
    section
}

fn operations(arguments: &Arguments, model: &Model, shares: &Shares) -> Result<Section> {
    let mut section = Section("operations of a rank, exact", Vec::new());
    let mask = match arguments.full {
        true => Mask::Full,
        false => Mask::Causal,
    };
    let work = Work {
        mask,
        is_checkpointed: !arguments.no_checkpoints,
        has_tiled_mlp: arguments.tiled_mlp.is_some(),
        has_tiled_loss: arguments.tiled_loss.is_some(),
        is_attention_fused: true,
    };
    let step = flops::step(model, shares, arguments.rank, &work)?;
    let mut add = |name, of: fn(&Flops) -> u128| {
        section.count(
            name,
            of(&step.forward) + of(&step.recompute) + of(&step.backward),
        );
    };
    add("attention", |flops| flops.attention);
    add("projections", |flops| flops.projections);
    add("MLP", |flops| flops.mlp);
    add("logits", |flops| flops.logits);
    section.count("forward", step.forward.total());
    section.count("recomputed in backward", step.recompute.total());
    section.count("backward", step.backward.total());
    section.count("step", step.total());
    let size = model.head_size;
    let of_layer = |mask| flops::attention(shares, arguments.rank, (size, size), mask);
    section.count(
        "attention of a layer, forward, causal",
        of_layer(Mask::Causal)?,
    );
    section.count("attention of a layer, forward, full", of_layer(Mask::Full)?);
    if let Some(seconds) = arguments.seconds {
        let alst = Rule::Alst.of_all(model, shares.batch(), shares.sequence())?;
        let of_all = tera_per_second(alst, arguments.sp, seconds);
        section.real(
            "operations per second",
            "T/s",
            tera_per_second(step.total(), 1, seconds),
        );
        section.real("by ALST's rule, which is not causal", "T/s", of_all);
    }
    Ok(section)
}

fn tensors(arguments: &Arguments, model: &Model, shares: &Shares) -> Result<Section> {
    let mut section = Section("tensors of a rank, exact", Vec::new());
    let own = shares.tokens().get(arguments.rank).copied().unwrap_or(0);
    let count = |tiling: Option<Tiling>, auto: u64| match tiling {
        None => 1,
        Some(Tiling::Auto) => auto.max(1),
        Some(Tiling::Tiles(tiles)) => tiles,
    };
    let of = |tiles| {
        activations::of(
            model,
            shares,
            arguments.rank,
            element_bytes(arguments),
            tiles,
        )
    };
    let untiled = of(Tiles { mlp: 1, loss: 1 })?;
    let of_gib = untiled.logits_tile.div_ceil(1 << 30);
    // The largest count of all ranks is that of the first.
    let first = shares.tokens().first().copied().unwrap_or(own);
    let tiles = Tiles {
        mlp: count(
            arguments.tiled_mlp,
            deepspeed_mlp_tiles(first, model.hidden),
        ),
        loss: count(
            arguments.tiled_loss,
            u64::try_from(of_gib).unwrap_or(u64::MAX),
        ),
    };
    let tensors = of(tiles)?;
    if !arguments.no_checkpoints {
        section.bytes(
            "inputs of all layers, kept by checkpointing",
            tensors.checkpoints,
        );
    }
    section.bytes(
        "queries or output before the exchange",
        tensors.query_in_sequence,
    );
    section.bytes("queries or output after it", tensors.query_in_heads);
    section.bytes("keys or values after it", tensors.kv_in_heads);
    section.count("tiles of the MLP", tiles.mlp);
    section.bytes("a tensor [tile, F] of the MLP", tensors.mlp_tile);
    section.count("tiles of the loss", tiles.loss);
    section.bytes("logits [tile, V] in float32", tensors.logits_tile);
    section.bytes("gathered position ids", tensors.positions);
    Ok(section)
}

fn estimate(arguments: &Arguments, model: &Model, sequence: u64) -> Result<Section> {
    let mut section = Section("memory of a GPU, a fit", Vec::new());
    section.count("parameters of the model", model.parameters()?);
    let offloads = |what| arguments.offload.contains(&what);
    if arguments.no_checkpoints || arguments.dtype != Dtype::Bf16 {
        section.words("estimate", "none but for bf16 with checkpoints");
        return Ok(section);
    }
    let training = Training {
        batch: arguments.batch,
        sequence_parallel: arguments.sp,
        world: arguments.world.unwrap_or(arguments.sp),
        ranks_per_node: arguments.gpus_per_host,
        offloads_checkpoints: offloads(Offload::Checkpoints),
        offloads_optimizer: offloads(Offload::Optimizer),
        offloads_parameters: offloads(Offload::Parameters),
        has_tiled_mlp: arguments.tiled_mlp.is_some(),
        has_tiled_loss: arguments.tiled_loss.is_some(),
        has_32_bit_kernel: arguments.int32_kernel,
        gpu_gib: arguments.gpu_memory,
        host_bytes: arguments.host_memory,
    };
    let held = memory::estimate(model, &training, sequence)?;
    section.real("base, the fitted constant", "GiB", held.base);
    section.real("states of the model", "GiB", held.states);
    section.real("checkpoints", "GiB", held.checkpoints);
    section.real("peak", "GiB", held.peak);
    section.words("peak is in", phase(held.phase));
    section.real("in all", "GiB", held.total());
    let (longest, limit) = memory::longest_sequence(model, &training)?;
    section.count("longest sequence, if the fit holds", longest);
    section.words("which is ended by", limited(limit));
    Ok(section)
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Attention => "attention",
        Phase::Mlp => "the MLP",
        Phase::Logits => "logits",
    }
}

/// What ends a sequence, in words.
pub(super) fn limited(limit: Limit) -> &'static str {
    match limit {
        Limit::Gpu(of) => phase(of),
        Limit::Host => "the host's memory",
        Limit::Index => "32 bits",
    }
}
