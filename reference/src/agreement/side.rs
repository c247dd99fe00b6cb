//! Whether what a rank's call brings beside query, key and value fits them.

use super::check::{BATCH, Fault, HEAD_SIZE, HEADS, TOKENS, fault};
use super::descriptor::{Descriptor, FLOATS, SideTensors, TensorDescriptor};
use crate::{
    call::{Call, Documents},
    core_attention::BlockLayout,
    options::Options,
};

/// What one rank's call shows by itself. `options` and `call` say what the
/// agreed settings say; nothing of them that may differ between ranks is read.
pub(super) fn alone(
    descriptor: &Descriptor,
    options: &Options,
    call: &Call<'_>,
) -> Result<(), Fault> {
    let (query, key) = (descriptor.query(), descriptor.key());
    let [batch, tokens, query_heads, head_size] =
        [BATCH, TOKENS, HEADS, HEAD_SIZE].map(|dimension| query.size[dimension]);
    let kv_heads = key.size[HEADS];
    let side = &descriptor.side;

    let per_token: &[i64] = &[batch, tokens];
    let three: &[i64] = &[3, batch, tokens];
    let sections = options.rotary.map(|rotary| rotary.sections.is_some());
    let positions = match sections {
        None => vec![per_token, three],
        Some(false) => vec![per_token],
        Some(true) => vec![three],
    };
    expect("position_ids", &side.position_ids, &positions, &["int64"])?;
    expect(
        "attention_mask",
        &side.attention_mask,
        &[per_token],
        &["bool", "int64"],
    )?;
    expect("slopes", &side.slopes, &[&[query_heads]], &FLOATS)?;
    expect("sinks", &side.sinks, &[&[query_heads]], &FLOATS)?;
    let norms = [
        ("query_norm", &side.query_norm, query_heads),
        ("key_norm", &side.key_norm, kv_heads),
    ];
    for (argument, norm, heads) in norms {
        expect(
            argument,
            norm,
            &[&[heads, head_size]],
            &[query.dtype_name().unwrap_or_default()],
        )?;
    }

    let from_positions = matches!(call.documents, Some(Documents::FromPositions));
    let reader = match (options.rotary, from_positions) {
        (Some(_), _) => Some("a rotary embedding"),
        (None, true) => Some("documents from positions"),
        (None, false) => None,
    };
    match (reader, side.position_ids.dimensions) {
        (Some(reader), None) => fault(
            "position_ids",
            format!("is missing, and {reader} reads it"),
            "give the positions of this rank's tokens",
        ),
        (_, Some(3)) if from_positions => fault(
            "position_ids",
            "has three components, in which no document is seen to begin".to_owned(),
            "give the ends of the documents",
        ),
        _ => Ok(()),
    }
}

/// What one rank's call shows beside that of rank 0.
pub(super) fn beside(side: &SideTensors, of_first: &SideTensors) -> Result<(), Fault> {
    let pairs = side.all().into_iter().zip(of_first.all());
    for (argument, (tensor, of_first)) in SideTensors::NAMES.into_iter().zip(pairs) {
        let problem = match (tensor.dimensions, of_first.dimensions) {
            (None, Some(_)) => "is missing, but rank 0 gives it",
            (Some(_), None) => "is given, but rank 0 gives none",
            _ => continue,
        };
        return fault(
            argument,
            problem.to_owned(),
            "give it on every rank or on none",
        );
    }
    Ok(())
}

/// What only the whole sequence decides.
pub(super) fn together(
    descriptor: &Descriptor,
    total: usize,
    call: &Call<'_>,
) -> Result<(), Fault> {
    let [batch, _, query_heads, _] = descriptor.query().size;
    if let Some(ends) = descriptor.ends {
        let total = total as i64;
        if ends.rows != batch {
            let problem = format!("tells of {} batch rows, but `query` has {batch}", ends.rows);
            return fault("documents", problem, "give the ends of each row");
        }
        if ends.falling_row >= 0 {
            let problem = format!("has ends that go down in batch row {}", ends.falling_row);
            return fault("documents", problem, "give cumulative lengths");
        }
        if let Some(last) = ends.last.into_iter().find(|&last| last != total) {
            let problem = format!("ends at token {last}, but the sequence has {total}");
            return fault(
                "documents",
                problem,
                "give lengths that add up to the sequence",
            );
        }
    }
    if let (Some(layout), Some(block)) = (descriptor.layout, call.layout.map(BlockLayout::block)) {
        let due = [query_heads, total.div_ceil(block) as i64];
        if layout != due {
            return fault(
                "layout",
                format!("is for {} heads and {} blocks", layout[0], layout[1]),
                &format!("give one for {} heads and {} blocks", due[0], due[1]),
            );
        }
    }
    Ok(())
}

/// That a tensor, if it was given, has one of these shapes and dtypes.
fn expect(
    argument: &'static str,
    given: &TensorDescriptor,
    shapes: &[&[i64]],
    dtypes: &[&str],
) -> Result<(), Fault> {
    let Some(shape) = given.shape() else {
        return Ok(());
    };
    if given.dimensions != Some(shape.len() as i64) || !shapes.contains(&shape) {
        let due: Vec<_> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
        return fault(
            argument,
            format!("has shape {shape:?}"),
            &format!("give {}", due.join(" or ")),
        );
    }
    match given.dtype_name() {
        Some(name) if dtypes.contains(&name) => Ok(()),
        name => fault(
            argument,
            format!("is {}", name.unwrap_or("of another dtype")),
            &format!("give {}", dtypes.join(" or ")),
        ),
    }
}
