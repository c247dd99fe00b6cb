//! Ulysses attention for a model: what
//! `UlyssesSPAttentionHF.register_with_transformers` of DeepSpeed does for one
//! of transformers.
//!
//! Unlike there, a model is registered by itself: others of the process, with
//! other heads, keep their own attention.

use super::{
    Llama, SequenceParallel,
    attention_functions::{AttentionFunction, KERNELS, UlyssesFunction, kernel},
};
use crate::{
    agreement,
    communicator::Communicator,
    core_attention::Kernel,
    error::{Error, Refusal, Result, refuse},
    head_partition::HeadPartition,
    mesh::{Mesh, MeshShape},
    options::{Options, SequenceLength},
};
use std::sync::Arc;

/// How a model is registered; the same on all ranks, but for the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registration<'a> {
    /// The kernel that each rank runs on its heads, `eager` or `sdpa`.
    pub core_attention: &'a str,
    /// The ranks that share a sequence, P.
    pub sequence_parallel_size: usize,
    /// The rows of each batch, B.
    pub micro_batch_size: usize,
    /// The tokens of the whole sequence, S. Needed where it is not variable,
    /// and not looked at where it is.
    pub sequence_length: Option<usize>,
    /// Whether S may change from call to call. Where it may not, each rank
    /// holds S/P tokens.
    pub sequence_length_is_variable: bool,
    /// Outside training, take the whole sequence on every rank and communicate
    /// nothing.
    pub disable_in_eval: bool,
    /// Whether some ranks may hold one query head more than others.
    pub uneven_heads: bool,
}

impl Default for Registration<'_> {
    fn default() -> Self {
        Self {
            core_attention: "sdpa",
            sequence_parallel_size: 1,
            micro_batch_size: 1,
            sequence_length: None,
            sequence_length_is_variable: true,
            disable_in_eval: false,
            uneven_heads: false,
        }
    }
}

const ARGUMENTS: [&str; 4] = [
    "core_attention",
    "sequence_parallel_size",
    "micro_batch_size",
    "sequence_length",
];

/// Cuts `world` into groups of `sequence_parallel_size` ranks that stand side
/// by side, and registers `model` in that of this rank, as
/// [`register_in_group`] does; the mesh has one replica for each group.
///
/// # Errors
/// As for [`register_in_group`], the same on every rank of the world, and
/// refused when the world cannot be cut so.
pub fn register_with_model(
    model: &mut Llama,
    world: Arc<dyn Communicator>,
    registration: &Registration<'_>,
) -> Result<Mesh> {
    agree(&*world, model, registration)?;
    let (ranks, sp) = (world.size(), registration.sequence_parallel_size);
    if !ranks.is_multiple_of(sp) {
        return refuse(
            "sequence_parallel_size",
            format!("is {sp}, but the world has {ranks} ranks"),
            "give a size that divides the world",
        );
    }
    let shape = MeshShape {
        dp_replicate: 1,
        dp_shard: ranks / sp,
        sp,
    };
    let mesh = Mesh::new(world, shape)?;
    register_in_group(model, Arc::clone(mesh.sequence_parallel()), registration)?;
    Ok(mesh)
}

/// Puts Ulysses attention among the ranks of `group` behind every name in the
/// registry of `model`. Registered again, it is the later one that counts.
///
/// # Errors
/// Refused, the same on every rank and with the registry as it was, when the
/// group has another size than `sequence_parallel_size`, when no kernel has
/// the name, when a count is 0 or the length is missing or no multiple of P,
/// when the heads of a layer cannot be shared out, or when a rank says
/// otherwise than rank 0.
pub fn register_in_group(
    model: &mut Llama,
    group: Arc<dyn Communicator>,
    registration: &Registration<'_>,
) -> Result<()> {
    let options = agree(&*group, model, registration)?;
    let (size, due) = (group.size(), registration.sequence_parallel_size);
    if size != due {
        let problem = format!("is {due}, but the group has {size} ranks");
        return refuse("sequence_parallel_size", problem, format!("give {size}"));
    }
    let function: Arc<dyn AttentionFunction> =
        Arc::new(UlyssesFunction::new(Arc::clone(&group), options));
    model.attention_functions.override_all(&function);
    model.sequence_parallel = Some(SequenceParallel {
        group,
        micro_batch_size: registration.micro_batch_size,
        disable_in_eval: registration.disable_in_eval,
    });
    Ok(())
}

/// The options of this rank's attention, where every rank may register so and
/// registers the same.
fn agree(
    ranks: &dyn Communicator,
    model: &Llama,
    registration: &Registration<'_>,
) -> Result<Options> {
    let own = options(model, registration);
    let settings = settings(model, registration);
    let facts = own.as_ref().map_err(Clone::clone);
    let facts = facts.map(|_| settings.map(|(_, word)| word).to_vec());
    let gathered = agreement::gather(ranks, facts, settings.len(), &ARGUMENTS)?;
    like_rank_0(&gathered, &settings)?;
    own
}

/// The options of the attention that is asked for.
fn options(model: &Llama, registration: &Registration<'_>) -> Result<Options> {
    let kernel = kernel_of(registration.core_attention)?;
    let ranks = registration.sequence_parallel_size;
    let counts = [
        ("sequence_parallel_size", ranks),
        ("micro_batch_size", registration.micro_batch_size),
    ];
    for (argument, count) in counts {
        if count == 0 {
            return refuse(argument, "is 0", "give at least 1");
        }
    }
    for (layer, heads) in model.config.heads.iter().enumerate() {
        let shared = HeadPartition::new(heads.query, heads.kv, ranks);
        if !shared.is_ok_and(|shared| shared.is_even() || registration.uneven_heads) {
            let (query, kv) = (heads.query, heads.kv);
            return refuse(
                "sequence_parallel_size",
                format!("is {ranks}, but layer {layer} has {query} query and {kv} KV heads"),
                "give a size that divides the query heads of every layer, \
                 or with `uneven_heads` one that is at most their number",
            );
        }
    }
    Ok(Options {
        kernel,
        uneven_heads: registration.uneven_heads,
        sequence_length: length(registration)?,
        disable_in_eval: registration.disable_in_eval,
        ..Options::default()
    })
}

fn kernel_of(name: &str) -> Result<Kernel> {
    match kernel(name) {
        Some(kernel) => Ok(kernel),
        None => refuse(
            "core_attention",
            format!("is `{name}`, which names no kernel"),
            format!("give one of {}", KERNELS.map(|(name, _)| name).join(", ")),
        ),
    }
}

fn length(registration: &Registration<'_>) -> Result<SequenceLength> {
    if registration.sequence_length_is_variable {
        return Ok(SequenceLength::Variable);
    }
    let ranks = registration.sequence_parallel_size;
    match registration.sequence_length {
        None => refuse(
            "sequence_length",
            "is missing, and the length is not variable",
            "give the tokens of the whole sequence",
        ),
        Some(global) if !global.is_multiple_of(ranks) => refuse(
            "sequence_length",
            format!("is {global}, no multiple of the {ranks} ranks"),
            "pad the sequence, or let the length be variable",
        ),
        Some(global) => Ok(SequenceLength::Fixed {
            local: global / ranks,
            global,
        }),
    }
}

/// What every rank registers alike and its attention cannot see.
fn settings(model: &Llama, registration: &Registration<'_>) -> [(&'static str, i64); 6] {
    let length = registration
        .sequence_length
        .filter(|_| !registration.sequence_length_is_variable);
    let counts = [
        (
            "sequence_parallel_size",
            registration.sequence_parallel_size,
        ),
        ("micro_batch_size", registration.micro_batch_size),
        ("sequence_length", length.unwrap_or(0)),
        ("disable_in_eval", registration.disable_in_eval.into()),
        ("uneven_heads", registration.uneven_heads.into()),
        ("model", model.config.layers()),
    ];
    counts.map(|(name, count)| (name, count as i64))
}

fn like_rank_0(gathered: &[Vec<i64>], settings: &[(&'static str, i64)]) -> Result<()> {
    let Some((first, others)) = gathered.split_first() else {
        return Ok(());
    };
    for (rank, words) in others.iter().enumerate() {
        let names = settings.iter().map(|(name, _)| *name);
        let differs = names
            .zip(words.iter().zip(first))
            .find(|(_, (word, of_first))| word != of_first);
        if let Some((argument, _)) = differs {
            return Err(Error::from(Refusal {
                rank: Some(rank + 1),
                argument,
                problem: "differs from that of rank 0".to_owned(),
                remedy: "register the same model in the same way on every rank".to_owned(),
            }));
        }
    }
    Ok(())
}
