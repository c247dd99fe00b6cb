//! How the reference answers in the profile `mesh`.

use std::sync::Arc;

use fixtures::exchange::{Tensors, tensor};
use fixtures::mesh::{GROUPS, MeshInfo};
use fixtures::{Array, Dtype};
use tch::Device;
use ulysses::communicator::collectives;
use ulysses::{Communicator, Mesh, MeshShape};

use crate::tensor::{from_array_on, to_array};

pub(super) fn answer(
    communicator: &Arc<dyn Communicator>,
    device: Device,
    info: &MeshInfo,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    let shape = MeshShape {
        dp_replicate: info.dp_replicate,
        dp_shard: info.dp_shard,
        sp: info.sp,
    };
    let mesh = Mesh::new(Arc::clone(communicator), shape).map_err(|error| error.to_string())?;
    let mut answer = Tensors::new();
    let mut insert = |name: &str, numbers: &[i64]| {
        let array = Array::from_i64(&[numbers.len()], numbers);
        answer.insert(name.to_owned(), array);
    };
    let at = mesh.coordinates();
    let at = [at.dp_replicate, at.dp_shard, at.sp].map(|place| place as i64);
    insert("coordinates", &at);
    // In the order of `GROUPS`.
    let groups = [
        mesh.sequence_parallel(),
        mesh.data_parallel_shard(),
        mesh.data_parallel_replicate(),
        mesh.data_parallel(),
        mesh.sharding(),
    ];
    for (name, group) in GROUPS.into_iter().zip(groups) {
        // Its members say who they are.
        let said = group.all_gather(&[communicator.rank() as i64]);
        let members = said.map_err(|error| error.to_string())?.concat();
        insert(name, &members);
    }
    if info.mpu {
        let mpu = [
            mesh.sequence_parallel_rank(),
            mesh.sequence_parallel_world_size(),
            mesh.sequence_data_parallel_rank(),
            mesh.sequence_data_parallel_world_size(),
            mesh.model_parallel_rank(),
            mesh.model_parallel_world_size(),
        ];
        insert("mpu", &mpu.map(|number| number as i64));
    }
    if info.sums {
        let value = from_array_on(device, tensor(inputs, "value")?);
        let value = value.map_err(|error| error.to_string())?;
        for (name, group) in GROUPS.into_iter().zip(groups) {
            let sum = collectives::all_reduce(&**group, &value);
            let sum = sum.map_err(|error| error.to_string())?;
            let array = to_array(&sum, Dtype::I64).map_err(|error| error.to_string())?;
            answer.insert(format!("sum.{name}"), array);
        }
    }
    Ok(answer)
}
