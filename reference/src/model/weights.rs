//! Weights at rest: safetensors files with Hugging Face's names, in one file
//! or in several with an index.

use super::parameters::{EMBEDDING, HEAD, ParameterShape};
use crate::error::{Result, refuse};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};
use tch::{Device, Kind, Tensor};

const ONE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Tensors by the name of the parameter.
pub type Weights = BTreeMap<String, Tensor>;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// All tensors in the files of `folder`, in the dtypes in which they are there.
///
/// # Errors
/// Refused when a file is missing or is none, or holds a tensor of another
/// dtype than float64, float32, bfloat16 and float16.
pub(super) fn read(folder: &Path) -> Result<Weights> {
    let mut all = Weights::new();
    for path in files(folder)? {
        let bytes = fs::read(&path).or_else(|error| unreadable(&path, error))?;
        let file = SafeTensors::deserialize(&bytes).or_else(|error| unreadable(&path, error))?;
        for (name, view) in file.tensors() {
            let tensor = tensor(&name, &view)?;
            if all.insert(name.clone(), tensor).is_some() {
                let problem = format!("has `{name}` in more than one file");
                return refuse("weights", problem, "give each parameter once");
            }
        }
    }
    Ok(all)
}

/// The weights that a model of these `parameters` has, in their order, as
/// leaves of `kind` on `device`.
///
/// # Errors
/// Refused when one is missing, has another shape or dtype, or is no parameter of the
/// model.
pub(super) fn in_order(
    parameters: &[ParameterShape],
    mut weights: Weights,
    kind: Kind,
    device: Device,
) -> Result<Vec<Tensor>> {
    leave_out_derived(parameters, &mut weights)?;
    let leaf = |parameter: &ParameterShape| {
        let ParameterShape { name, shape } = parameter;
        let Some(weight) = weights.remove(name) else {
            return refuse(
                "weights",
                format!("has no `{name}`"),
                format!("give it, of shape {shape:?}"),
            );
        };
        let (size, given) = (weight.size(), weight.f_kind()?);
        if size != *shape || !KINDS.iter().any(|&(_, known)| known == given) {
            let problem = format!("has `{name}` of shape {size:?} and kind {given:?}");
            let remedy = format!("give {shape:?} of float64, float32, bfloat16 or float16");
            return refuse("weights", problem, remedy);
        }
        // A copy, so that no optimizer changes what the caller gave.
        let weight = weight.f_detach()?.f_to_device(device)?;
        Ok(weight
            .f_to_dtype(kind, false, true)?
            .f_set_requires_grad(true)?)
    };
    let leaves = parameters.iter().map(leaf).collect::<Result<_>>()?;
    match weights.keys().next() {
        None => Ok(leaves),
        Some(name) => refuse(
            "weights",
            format!("has `{name}`, which this model has not"),
            "give those of the config and no more",
        ),
    }
}

/// What older files hold beside the parameters: frequencies, which follow from
/// the config, and a tied head, which has to be the embedding.
fn leave_out_derived(parameters: &[ParameterShape], weights: &mut Weights) -> Result<()> {
    weights.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
    let tied = parameters.iter().all(|parameter| parameter.name != HEAD);
    let Some(head) = tied.then(|| weights.remove(HEAD)).flatten() else {
        return Ok(());
    };
    match weights.get(EMBEDDING) {
        Some(embedding) if embedding.size() != head.size() || !embedding.f_equal(&head)? => refuse(
            "weights",
            format!("has a `{HEAD}` that differs from `{EMBEDDING}`, but the config ties them"),
            "leave it out, or set `tie_word_embeddings` to false",
        ),
        _ => Ok(()),
    }
}

/// Writes `weights` to one file of `folder`.
///
/// # Errors
/// Refused when it cannot be written.
pub(super) fn write(folder: &Path, weights: &[(String, &Tensor)]) -> Result<()> {
    let mut held = Vec::new();
    for (name, tensor) in weights {
        let kind = tensor.f_kind()?;
        let Some((dtype, _)) = KINDS.into_iter().find(|&(_, of)| of == kind) else {
            let problem = format!("has `{name}` of kind {kind:?}");
            return refuse("weights", problem, "give a float dtype");
        };
        let tensor = tensor
            .f_detach()?
            .f_to_device(Device::Cpu)?
            .f_contiguous()?;
        let count = tensor.numel();
        let mut bytes = vec![0; count * kind.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, count)?;
        let shape: Vec<usize> = tensor.size().iter().map(|&size| size as usize).collect();
        held.push((name, dtype, shape, bytes));
    }
    let path = folder.join(ONE_FILE);
    let views = held
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name, view))
        })
        .collect::<Result<Vec<_>, _>>()
        .or_else(|error| unwritable(&path, error))?;
    // transformers refuses a file that does not say whose tensors these are.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), &path)
        .or_else(|error| unwritable(&path, error))
}

/// The files that hold the weights.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (one, index) = (folder.join(ONE_FILE), folder.join(INDEX));
    if one.exists() {
        return Ok(vec![one]);
    }
    if !index.exists() {
        return refuse(
            "folder",
            format!(
                "`{}` has neither `{ONE_FILE}` nor `{INDEX}`",
                folder.display()
            ),
            "give a folder that `save_pretrained` wrote",
        );
    }
    let text = fs::read(&index).or_else(|error| unreadable(&index, error))?;
    let read: Index = serde_json::from_slice(&text).or_else(|error| unreadable(&index, error))?;
    let names: BTreeSet<&String> = read.weight_map.values().collect();
    names
        .into_iter()
        .map(|name| match Path::new(name).file_name() {
            Some(only) if only == name.as_str() => Ok(folder.join(name)),
            _ => unreadable(&index, format!("`{name}` is no file of the folder")),
        })
        .collect()
}

const KINDS: [(Dtype, Kind); 4] = [
    (Dtype::F64, Kind::Double),
    (Dtype::F32, Kind::Float),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::F16, Kind::Half),
];

fn tensor(name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let Some((_, kind)) = KINDS.into_iter().find(|&(dtype, _)| dtype == view.dtype()) else {
        let problem = format!("has `{name}` of dtype {:?}", view.dtype());
        return refuse(
            "weights",
            problem,
            "give float64, float32, bfloat16 or float16",
        );
    };
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    Ok(Tensor::f_from_data_size(view.data(), &shape, kind)?)
}

fn unreadable<T>(path: &Path, error: impl std::fmt::Display) -> Result<T> {
    refuse(
        "folder",
        format!("has `{}`, which cannot be read: {error}", path.display()),
        "give a folder that `save_pretrained` wrote",
    )
}

pub(super) fn unwritable<T>(path: &Path, error: impl std::fmt::Display) -> Result<T> {
    refuse(
        "folder",
        format!("takes no `{}`: {error}", path.display()),
        "give a folder that can be written to",
    )
}
