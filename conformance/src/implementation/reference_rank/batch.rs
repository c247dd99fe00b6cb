//! How the reference answers in the profile `batch`.

use std::sync::Arc;

use fixtures::batch::BatchInfo;
use fixtures::exchange::{Tensors, tensor};
use fixtures::{Array, Dtype};
use tch::TchError;
use ulysses::{Batch, Communicator, DataLoaderAdapter, Preparation, Shard, Sharding, Shift};

use crate::tensor::{from_array, to_array};

pub(super) fn answer(
    communicator: &Arc<dyn Communicator>,
    info: &BatchInfo,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    let said = |error: ulysses::Error| error.to_string();
    let preparation = preparation(info)?;
    let mut answer = Tensors::new();
    let Some(stream) = &info.stream else {
        let (rank, ranks) = (communicator.rank(), communicator.size());
        let whole = preparation.prepare(read(info, inputs, "")?).map_err(said)?;
        let shard = whole
            .shard(preparation.sharding, rank, ranks)
            .map_err(said)?;
        write(&shard, "", &mut answer)?;
        return Ok(answer);
    };
    let open = |_| (0..stream.batches).map(|number| read(info, inputs, &format!(".{number}")));
    let mut adapter = DataLoaderAdapter::new(Arc::clone(communicator), preparation, open);
    let (mut number, mut served) = (0, Vec::new());
    for _ in 0..stream.epochs {
        let before = number;
        for shard in adapter.epoch() {
            write(&shard.map_err(said)?, &format!(".{number}"), &mut answer)?;
            number += 1;
        }
        served.push(i64::from(number - before));
    }
    let served = Array::from_i64(&[served.len()], &served);
    answer.insert("served".to_owned(), served);
    Ok(answer)
}

fn preparation(info: &BatchInfo) -> Result<Preparation, String> {
    let padding = info.padding.as_ref();
    Ok(Preparation {
        pad_to_multiple_of: padding.map_or(1, |padding| padding.multiple),
        pad_id: padding.map_or(0, |padding| padding.pad_id),
        shift: Some(match info.targets_across_documents {
            true => Shift::AcrossDocuments,
            false => Shift::WithinDocuments,
        }),
        ignore_index: info.ignore_index,
        sharding: match info.sharding.as_str() {
            "contiguous" => Sharding::Contiguous,
            "zigzag" => Sharding::Zigzag,
            "striped" => Sharding::Striped,
            other => return Err(format!("`{other}` is no sharding")),
        },
    })
}

/// The batch of which the tensors' names end so.
fn read(info: &BatchInfo, inputs: &Tensors, end: &str) -> Result<Batch, String> {
    let said = |error: TchError| error.to_string();
    let input = |name: &str| from_array(tensor(inputs, &format!("{name}{end}"))?).map_err(said);
    let mut batch = Batch::default()
        .with("input_ids", input("input_ids")?)
        .with("labels", input("labels")?);
    if info.attention_mask {
        batch = batch.with("attention_mask", input("attention_mask")?);
    }
    Ok(match info.documents.as_deref() {
        Some("positions") => batch.with("position_ids", input("position_ids")?),
        Some("ends") => {
            let rows = Vec::<Vec<i64>>::try_from(input("document_ends")?).map_err(said)?;
            let ends = rows
                .into_iter()
                .map(|row| row.into_iter().map(|end| end as usize).collect());
            batch.with_document_ends(ends.collect())
        }
        _ => batch,
    })
}

fn write(shard: &Shard, end: &str, answer: &mut Tensors) -> Result<(), String> {
    for (name, entry) in &shard.entries {
        let array = to_array(entry, Dtype::I64).map_err(|error| error.to_string())?;
        answer.insert(format!("{name}{end}"), array);
    }
    Ok(())
}
