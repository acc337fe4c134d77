//! Loads a state from safetensors files of any writer: any world size, any strategy, this version or an earlier one.
//!
//! Every rank reads the headers of all files, checks every entry against the model, and requires that the slices of
//! each tensor contain each of its elements exactly once; then it copies only its own elements. The roles of tensors,
//! and the choice between two that hold the same weight, are explained in [`super`]. *Crash, error:* the state
//! is then partly filled and useless.

use std::{collections::HashMap, ops::Range};

use bytes::Bytes;
use tch::{Kind, Tensor};

use super::{Param, Role, State, Target, part};
use crate::{
    error::{Context, Error, Kind as ErrorKind, Result},
    format::{header, slices},
    snapshot::plan::Dtype,
    torch,
};

/// Where elements of a parameter are in the files.
struct Source<'a> {
    elements: Range<u64>,
    dtype: Dtype,
    bytes: &'a [u8],
    /// Number of its file, from 1.
    file: usize,
}

/// Where the files have each role's elements of each parameter.
#[derive(Default)]
struct Found<'a>(HashMap<(Role, usize), Vec<Source<'a>>>);

impl<'a> Found<'a> {
    fn add(&mut self, role: Role, param: usize, source: Source<'a>) {
        self.0.entry((role, param)).or_default().push(source);
    }

    fn of(&self, role: Role, param: usize) -> &[Source<'a>] {
        self.0.get(&(role, param)).map_or(&[], Vec::as_slice)
    }
}

impl State {
    /// Loads safetensors files. With `weights_only` the moments stay zero, other floating types are converted, and
    /// tensors that the model does not have are skipped; otherwise every tensor must be there, in one piece or in
    /// slices that hold each element once, with its very shape and type, and no other.
    pub fn load(&mut self, files: &[Bytes], weights_only: bool) -> Result<()> {
        let roles = roles(weights_only);
        let found = self.find(files, roles, weights_only)?;
        for &role in roles {
            for (number, param) in self.params.iter().enumerate().filter(|(_, param)| role.is_of(param.trained)) {
                check(&found, role, number, param, weights_only)?;
            }
        }
        for target in self.targets.iter().filter(|target| !weights_only || target.role.traits().is_value) {
            let masters = found.of(Role::Master, target.param);
            let sources = match target.role {
                Role::Weight | Role::Master if masters.is_empty() => found.of(Role::Weight, target.param),
                Role::Weight | Role::Master => masters,
                role => found.of(role, target.param),
            };
            for source in sources {
                let name = &self.params[target.param].name;
                let doing = || format!("load tensor {}", target.role.name_of(name));
                let filled = fill(target, source).context(doing())?;
                // Our own checkpoints are checked by their checksums; of other files nothing is known.
                if weights_only
                    && let Some(filled) = filled
                    && !is_finite(&filled).context(doing())?
                {
                    return Err(not_finite(name, source.file, files.len()));
                }
            }
        }
        Ok(())
    }

    /// Where each parameter's elements of these `roles` are. Every entry has been checked against the model; whether
    /// the set is complete has not been checked.
    fn find<'a>(&self, files: &'a [Bytes], roles: &[Role], weights_only: bool) -> Result<Found<'a>> {
        let index: HashMap<&str, usize> =
            self.params.iter().enumerate().map(|(i, param)| (param.name.as_str(), i)).collect();
        let mut found = Found::default();
        for (number, file) in (1..).zip(files) {
            // Skipped tensors may be of any type.
            for entry in header::read_foreign(file)? {
                let (name, slice) = slices::parse_name(&entry.name);
                let named = roles.iter().find_map(|&role| {
                    let param = *index.get(name.strip_prefix(role.traits().prefix)?)?;
                    role.is_of(self.params[param].trained).then_some((role, param))
                });
                let Some((role, param)) = named else {
                    if weights_only {
                        continue;
                    }
                    return Err(mismatch(format!(
                        "checkpoint holds tensor {}, which the model does not have",
                        entry.name
                    )));
                };
                let Some(dtype) = Dtype::of_name(&entry.dtype) else {
                    return Err(header::HeaderError::Dtype { name: entry.name, dtype: entry.dtype }.into());
                };
                let Param { shape, len, .. } = &self.params[param];
                let shape = slice.as_ref().map_or_else(|| shape.clone(), |slice| vec![slice.end - slice.start]);
                // A slice of what is rounded would be of no use: what it was rounded from is there in slices.
                let known =
                    dtype == Dtype::F32 || weights_only || (role.traits().dtypes.contains(&dtype) && slice.is_none());
                if entry.shape != shape || !known {
                    return Err(mismatch(format!(
                        "tensor {} is {:?} {} in the files but {shape:?} F32 in the model",
                        entry.name, entry.shape, entry.dtype,
                    )));
                }
                let bytes = file_range(file, &entry.range)?;
                found.add(role, param, Source { elements: slice.unwrap_or(0..*len), dtype, bytes, file: number });
            }
        }
        Ok(found)
    }
}

/// The roles that are looked for. A foreign folder's `master.x` would be a parameter of another model.
fn roles(weights_only: bool) -> &'static [Role] {
    if weights_only { &[Role::Weight] } else { Role::ALL }
}

/// Whether the files have every element of one role of a parameter exactly once.
fn check(found: &Found<'_>, role: Role, number: usize, param: &Param, weights_only: bool) -> Result<()> {
    let sources = found.of(role, number);
    let name = role.name_of(&param.name);
    if sources.is_empty() && role == Role::Master {
        // Only rounded weights are accompanied by masters.
        let rounded = found.of(Role::Weight, number).iter().any(|source| source.dtype != Dtype::F32);
        if rounded && !weights_only {
            let weight = &param.name;
            return Err(mismatch(format!("tensor {weight} is not F32 in the files, and there is no {name}")));
        }
        return Ok(());
    }
    if sources.is_empty() && param.len > 0 {
        return Err(mismatch(format!("tensor {name} is in none of the files")));
    }
    slices::check_cover(sources.iter().map(|source| source.elements.clone()), param.len)
        .map_err(|reason| Error::new(ErrorKind::Data, format!("tensor {name} {reason} in the files")))
}

fn mismatch(message: String) -> Error {
    Error::new(ErrorKind::Config, message).with_hint(
        "the model's configuration and the files do not belong together: check model.config and model.init_from",
    )
}

fn not_finite(tensor: &str, file: usize, files: usize) -> Error {
    let what =
        format!("tensor {tensor} of model.init_from holds numbers that are not finite, in file {file} of {files}");
    Error::new(ErrorKind::Config, what)
        .with_hint("no training repairs weights that are NaN or infinite: take another copy of the model's files")
}

/// Whether all elements are finite. A sum needs no second copy of them, and none of 32 bits overflows 64.
fn is_finite(tensor: &Tensor) -> Result<bool, torch::TorchError> {
    let sum = torch::tch_result("sum tensor", tensor.f_sum(Kind::Double).and_then(|sum| sum.f_double_value(&[])));
    sum.map(f64::is_finite)
}

/// Copies the elements that `target` and `source` have in common; returns where they are now, if there are any.
fn fill(target: &Target, source: &Source<'_>) -> Result<Option<Tensor>, torch::TorchError> {
    let end = target.begin + target.tensor.numel() as u64;
    let (begin, end) = (target.begin.max(source.elements.start), end.min(source.elements.end));
    if begin >= end {
        return Ok(None);
    }
    let to = torch::tch_result("load tensor", part(&target.tensor, begin - target.begin, end - begin))?;
    let size = source.dtype.size();
    let offset = |element: u64| usize::try_from((element - source.elements.start) * size).unwrap_or(usize::MAX);
    // The source's bytes match its elements: the header was checked against the file, and the slice against the header.
    let bytes = source.bytes.get(offset(begin)..offset(end)).unwrap_or_default();
    let (kind, own) = match source.dtype {
        Dtype::F32 => (Kind::Float, to.kind() == Kind::Float),
        Dtype::BF16 => (Kind::BFloat16, to.kind() == Kind::BFloat16),
        Dtype::F16 => (Kind::Half, false),
        Dtype::I64 => (Kind::Int64, false),
    };
    if own {
        return torch::load_bytes(&to, bytes).map(|()| Some(to));
    }
    let copied = tch::no_grad(|| {
        let given = Tensor::f_from_data_size(bytes, &to.size(), kind)?;
        to.shallow_clone().f_copy_(&given)
    });
    torch::tch_result("convert tensor", copied).map(|_| Some(to))
}

fn file_range<'a>(file: &'a [u8], range: &Range<u64>) -> Result<&'a [u8]> {
    let start = usize::try_from(range.start).ok();
    let end = usize::try_from(range.end).ok();
    let bytes = start.zip(end).and_then(|(start, end)| file.get(start..end));
    bytes.ok_or_else(|| Error::new(ErrorKind::Data, "a tensor lies outside of its file"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::{
        config::{ModelKind, Precision, Strategy},
        ids::{Rank, WorldSize},
        model::{self, BuildSettings, Model, Weight},
        snapshot::plan::plan,
        train::{
            state::{Row, Tensors, signed, testing},
            strategy::lay_out_small,
        },
    };

    fn build(precision: Precision, seed: u64) -> Box<dyn Model> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        });
        model::build(ModelKind::Decoder, &config, &BuildSettings { device: Device::Cpu, precision, seed: Some(seed) })
            .unwrap()
    }

    /// A world's states by rank, `zero1` or `ddp`.
    fn world(zero1: bool, precision: Precision, world: u32, seed: u64) -> Vec<State> {
        world_of(if zero1 { Strategy::Zero1 } else { Strategy::Ddp }, precision, world, seed)
    }

    fn world_of(strategy: Strategy, precision: Precision, world: u32, seed: u64) -> Vec<State> {
        let state = |rank| {
            let mut model = build(precision, seed);
            lay_out_small(strategy, precision, model.as_mut(), Rank(rank), WorldSize(world)).unwrap().0
        };
        (0..world).map(state).collect()
    }

    /// Moments other than zero: a function of name and place alone.
    fn stir(states: &[State]) {
        for state in states {
            for target in state.targets.iter().filter(|target| !target.role.traits().is_value) {
                let count = target.tensor.numel() as i64;
                let begin = signed(target.begin) + 1000 * target.param as i64 + 7 * target.role as i64;
                let values = (Tensor::arange_start(begin, begin + count, (Kind::Float, Device::Cpu)) * 0.1).sin();
                target.tensor.shallow_clone().copy_(&values);
            }
        }
    }

    /// The files that a world would save.
    fn files(states: &[State]) -> Vec<Bytes> {
        let specs = states[0].specs();
        assert!(states.iter().all(|state| state.specs() == specs), "ranks differ in what there is");
        let plans = plan(specs, WorldSize(states.len() as u32), 4096).unwrap();
        let mut files = Vec::new();
        for (state, plan) in states.iter().zip(plans) {
            for shard in plan.shards {
                let mut file = shard.header;
                for place in shard.tensors {
                    let start = file.len();
                    file.resize(start + place.len as usize, 0);
                    torch::store_bytes(&state.tensors()[place.tensor], &mut file[start..]).unwrap();
                }
                files.push(file.into());
            }
        }
        files
    }

    /// Every tensor in one piece, put together from whatever slices there are.
    fn together(files: &[Bytes]) -> BTreeMap<String, Vec<u8>> {
        let mut slices: BTreeMap<(String, u64), Vec<u8>> = BTreeMap::new();
        for file in files {
            for entry in header::read(file).unwrap() {
                let (name, slice) = slices::parse_name(&entry.name);
                let bytes = file[entry.range.start as usize..entry.range.end as usize].to_vec();
                let begin = slice.map_or(0, |slice| slice.start);
                assert!(slices.insert((name.to_owned(), begin), bytes).is_none(), "{}", entry.name);
            }
        }
        let mut whole: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for ((name, _), bytes) in slices {
            whole.entry(name).or_default().extend(bytes);
        }
        whole
    }

    fn load(states: &mut [State], files: &[Bytes]) {
        states.iter_mut().for_each(|state| state.load(files, false).unwrap());
    }

    /// Masters under the weights' names, and no weights that are only rounded.
    fn as_ddp_has_it(mut tensors: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
        let masters: Vec<String> = tensors.keys().filter(|name| name.starts_with("master.")).cloned().collect();
        for name in masters {
            let master = tensors.remove(&name).unwrap();
            tensors.insert(name["master.".len()..].to_owned(), master);
        }
        tensors
    }

    /// Earlier versions kept the weights of a bf16 run in fp32 alone, unless its strategy was zero1.
    #[test]
    fn fp32_weights_of_an_earlier_version_become_masters_and_rounded_copies() {
        let origin = world(false, Precision::Fp32, 1, 1);
        stir(&origin);
        let earlier = together(&files(&origin));
        for ranks in [1, 2] {
            let mut states = world(false, Precision::Bf16, ranks, 2);
            load(&mut states, &files(&origin));
            let now = together(&files(&states));
            assert!(as_ddp_has_it(now.clone()) == earlier);
            for (name, fp32) in earlier.iter().filter(|(name, _)| !name.starts_with("exp_avg")) {
                let values = Tensor::f_from_data_size(fp32, &[signed(fp32.len() as u64 / 4)], Kind::Float).unwrap();
                let mut rounded = vec![0; fp32.len() / 2];
                torch::store_bytes(&values.to_kind(Kind::BFloat16), &mut rounded).unwrap();
                assert!(now[name] == rounded, "{name}");
            }
        }
    }

    #[test]
    fn a_state_goes_through_every_world_and_strategy_without_losing_a_byte() {
        for precision in [Precision::Fp32, Precision::Bf16] {
            let origin = world(true, precision, 3, 1);
            stir(&origin);
            let first = files(&origin);
            let expected = together(&first);
            let slices = first.iter().flat_map(|file| header::read(file).unwrap());
            assert!(slices.filter(|entry| slices::parse_name(&entry.name).1.is_some()).count() > 6, "slices");
            let mut carried = first;
            for (zero1, ranks) in [(true, 2), (true, 4), (false, 2), (true, 3), (false, 1), (true, 5), (true, 3)] {
                // Another seed: values that are not loaded show.
                let mut next = world(zero1, precision, ranks, 2);
                load(&mut next, &carried);
                carried = files(&next);
                let got = together(&carried);
                assert_eq!(as_ddp_has_it(got).keys().len(), as_ddp_has_it(expected.clone()).keys().len());
                for (name, bytes) in as_ddp_has_it(together(&carried)) {
                    assert!(as_ddp_has_it(expected.clone())[&name] == bytes, "{name}, zero1 {zero1}, {ranks} ranks");
                }
            }
            // Rounded weights, too.
            assert!(together(&carried) == expected, "{precision:?}");
        }
    }

    fn saved(states: &[State]) -> Vec<Bytes> {
        testing::files(&states.iter().map(testing::held).collect::<Vec<_>>())
    }

    /// Files of whole weights, whoever has which part of them.
    #[test]
    fn a_sharded_state_goes_to_every_world_and_strategy_and_back_without_losing_a_byte() {
        use Strategy::{Ddp, Shard, Zero1};
        for precision in [Precision::Fp32, Precision::Bf16] {
            let origin = world_of(Shard, precision, 3, 1);
            stir(&origin);
            let mut carried = saved(&origin);
            let expected = together(&carried);
            let weights = build(precision, 1);
            for parameter in weights.parameters() {
                let entry = header::read(&carried[0]).unwrap().into_iter().find(|entry| entry.name == parameter.name);
                let shape = parameter.values().size().into_iter().map(|extent| extent as u64).collect::<Vec<_>>();
                assert_eq!(entry.unwrap().shape, shape, "{} is whole", parameter.name);
            }
            for (strategy, ranks) in [
                (Shard, 2),
                (Ddp, 2),
                (Shard, 4),
                (Zero1, 3),
                (Shard, 1),
                (Shard, 4),
                (Zero1, 2),
                (Ddp, 1),
                (Zero1, 4),
                (Shard, 3),
            ] {
                // Another seed: values that are not loaded show.
                let mut next = world_of(strategy, precision, ranks, 2);
                load(&mut next, &carried);
                carried = saved(&next);
                let (got, expected) = (as_ddp_has_it(together(&carried)), as_ddp_has_it(expected.clone()));
                assert!(got == expected, "{strategy:?}, {ranks} ranks, {precision:?}");
            }
            // Rounded weights, too.
            assert!(together(&carried) == expected, "{precision:?}");
        }
    }

    #[test]
    fn a_sharded_state_takes_weights_of_any_type_from_a_model_folder() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let tensors: Vec<_> = build(Precision::Fp32, 3)
                .parameters()
                .iter()
                .map(|parameter| (parameter.name.clone(), parameter.values().detach().to_kind(kind)))
                .collect();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.safetensors");
            Tensor::write_safetensors(&tensors, &path).unwrap();
            let file = Bytes::from(std::fs::read(path).unwrap());
            for precision in [Precision::Fp32, Precision::Bf16] {
                let mut states = world_of(Strategy::Shard, precision, 3, 1);
                states.iter_mut().for_each(|state| state.load(std::slice::from_ref(&file), true).unwrap());
                let got = as_ddp_has_it(together(&saved(&states)));
                for (name, tensor) in &tensors {
                    let fp32 = Vec::<f32>::try_from(tensor.to_kind(Kind::Float).view([-1])).unwrap();
                    let fp32: Vec<u8> = fp32.iter().flat_map(|x| x.to_le_bytes()).collect();
                    assert!(got[name] == fp32, "{name} {kind:?} {precision:?}");
                }
            }
        }
    }

    #[test]
    fn with_bf16_the_model_files_hold_the_rounded_weights_whole() {
        let files = files(&world(true, Precision::Bf16, 3, 1));
        let tensors = together(&files);
        for parameter in build(Precision::Fp32, 1).parameters() {
            let (name, leaf) = (&parameter.name, parameter.values());
            let fp32 = Vec::<f32>::try_from(leaf.detach().view([-1])).unwrap();
            let bits = |tensor: &Tensor| {
                let mut bytes = vec![0; torch::byte_len(tensor).unwrap()];
                torch::store_bytes(tensor, &mut bytes).unwrap();
                bytes
            };
            assert_eq!(
                tensors[&format!("master.{name}")],
                fp32.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()
            );
            assert_eq!(tensors[name], bits(&leaf.detach().to_kind(Kind::BFloat16)), "{name}");
        }
        let weights: Vec<_> = files.iter().flat_map(|file| header::read(file).unwrap()).collect();
        for entry in weights.iter().filter(|entry| entry.dtype == Dtype::BF16) {
            assert_eq!(slices::parse_name(&entry.name).1, None);
        }
    }

    #[test]
    fn weights_alone_are_taken_from_a_model_folder_of_any_type() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let source = build(Precision::Fp32, 3);
            let tensors: Vec<_> = source
                .parameters()
                .iter()
                .map(|parameter| (parameter.name.clone(), parameter.values().detach().to_kind(kind)))
                .chain([("rotary_emb.inv_freq".to_owned(), Tensor::zeros([3], (Kind::Double, Device::Cpu)))])
                .collect();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.safetensors");
            Tensor::write_safetensors(&tensors, &path).unwrap();
            let file = Bytes::from(std::fs::read(path).unwrap());
            let mut states = world(true, Precision::Bf16, 2, 1);
            stir(&states);
            states.iter_mut().for_each(|state| state.load(std::slice::from_ref(&file), true).unwrap());
            let got = together(&files(&states));
            for (name, tensor) in &tensors[..tensors.len() - 1] {
                let fp32 = Vec::<f32>::try_from(tensor.to_kind(Kind::Float).view([-1])).unwrap();
                let fp32: Vec<u8> = fp32.iter().flat_map(|x| x.to_le_bytes()).collect();
                assert!(got[&format!("master.{name}")] == fp32, "{name}");
            }
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_refused_by_tensor_and_file() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for (zero1, ranks) in [(false, 1), (true, 2)] {
                    let source = build(Precision::Fp32, 3);
                    let tensors: Vec<_> = source
                        .parameters()
                        .iter()
                        .map(|parameter| (parameter.name.clone(), parameter.values().detach().to_kind(kind)))
                        .collect();
                    let (name, tensor) = &tensors[2];
                    let _ = tensor.view([-1]).get(0).fill_(bad);
                    let folder = tempfile::tempdir().unwrap();
                    let file = |part: &[(String, Tensor)]| {
                        let path = folder.path().join("model.safetensors");
                        Tensor::write_safetensors(part, &path).unwrap();
                        Bytes::from(std::fs::read(path).unwrap())
                    };
                    let files = [file(&tensors[..2]), file(&tensors[2..])];
                    let mut states = world(zero1, Precision::Fp32, ranks, 1);
                    let errors: Vec<String> = states
                        .iter_mut()
                        .filter_map(|state| state.load(&files, true).err())
                        .map(|error| error.to_string())
                        .collect();
                    assert!(!errors.is_empty(), "{kind:?} {bad}");
                    for error in errors {
                        assert!(error.contains(name.as_str()) && error.contains("file 2 of 2"), "{error}");
                    }
                }
            }
        }
    }

    /// As [`world`], with the named parameter frozen.
    fn frozen_world(zero1: bool, precision: Precision, world: u32, seed: u64, frozen: &str, kind: Kind) -> Vec<State> {
        let strategy = if zero1 { Strategy::Zero1 } else { Strategy::Ddp };
        let state = |rank| {
            let mut model = build(precision, seed);
            let weights = model.parameters().iter().map(|parameter| match parameter.name == frozen {
                true => Weight::Frozen(parameter.values().detach().to_kind(kind)),
                false => parameter.weight.share(),
            });
            let weights = weights.collect();
            model.set_parameters(weights).unwrap();
            lay_out_small(strategy, precision, model.as_mut(), Rank(rank), WorldSize(world)).unwrap().0
        };
        (0..world).map(state).collect()
    }

    #[test]
    fn a_frozen_weight_goes_through_every_strategy_in_its_own_type_and_needs_no_master() {
        let name = "model.layers.0.mlp.up_proj.weight";
        for precision in [Precision::Fp32, Precision::Bf16] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let origin = frozen_world(true, precision, 3, 1, name, kind);
                stir(&origin);
                let mut carried = files(&origin);
                let expected = together(&carried);
                assert_eq!(expected.keys().filter(|key| key.ends_with(name)).collect::<Vec<_>>(), [name]);
                for (zero1, ranks) in [(true, 2), (false, 2), (false, 1), (true, 3)] {
                    let mut next = frozen_world(zero1, precision, ranks, 2, name, kind);
                    load(&mut next, &carried);
                    carried = files(&next);
                    assert!(together(&carried)[name] == expected[name], "{precision:?} {kind:?} {zero1} {ranks}");
                }
                assert!(together(&carried) == expected, "{precision:?} {kind:?}");

                // From a model folder, in whatever type it has them.
                let mut other = frozen_world(true, precision, 2, 2, name, kind);
                other.iter_mut().for_each(|state| state.load(&carried, true).unwrap());
                assert!(together(&files(&other))[name] == expected[name]);
                // One that was trained has moments, which a frozen one has no place for.
                let trained = files(&world(false, Precision::Fp32, 1, 1));
                let error = other[0].load(&trained, false).unwrap_err().to_string();
                assert!(error.contains("does not have") && error.contains(name), "{error}");
            }
        }
    }

    #[test]
    fn a_table_that_is_not_the_models_is_refused() {
        let model = build(Precision::Fp32, 1);
        let zeros = [Tensor::zeros([4], (Kind::Float, Device::Cpu))];
        let short = Row { role: Role::ExpAvg, tensors: Tensors::Whole(&zeros) };
        assert!(State::new(model.as_ref(), &[short]).is_err());
        let mut rounded = build(Precision::Fp32, 1);
        let weights =
            rounded.parameters().iter().map(|parameter| Weight::Frozen(parameter.values().to_kind(Kind::Half)));
        let weights = weights.collect();
        rounded.set_parameters(weights).unwrap();
        let row = Row { role: Role::Weight, tensors: Tensors::OfModel };
        let error = State::new(rounded.as_ref(), &[row]).unwrap_err().to_string();
        assert!(error.contains("Half"), "{error}");
    }

    /// A file with these tensors, its data the bytes 0, 1, 2, …
    fn file(tensors: &[(&str, Dtype, &[u64])]) -> Bytes {
        let mut file = header::write(tensors.iter().copied()).unwrap();
        let data: u64 = tensors.iter().map(|(_, dtype, shape)| dtype.bytes(shape).unwrap()).sum();
        file.extend((0..data).map(|i| i as u8));
        file.into()
    }

    #[test]
    fn hostile_slices_are_refused() {
        let good = files(&world(true, Precision::Bf16, 2, 1));
        let mut state = world(true, Precision::Bf16, 2, 1).remove(1);
        state.load(&good, false).unwrap();
        let norm = "model.norm.weight";
        // All tensors as they are, but for one, which is cut anew.
        let without = |name: &str| {
            let mut kept = Vec::new();
            for bytes in &good {
                let entries = header::read(bytes).unwrap();
                let entries: Vec<_> =
                    entries.iter().filter(|entry| slices::parse_name(&entry.name).0 != name).collect();
                let header = entries.iter().map(|e| (e.name.as_str(), e.dtype, e.shape.as_slice()));
                let mut file = header::write(header).unwrap();
                entries.iter().for_each(|e| file.extend(&bytes[e.range.start as usize..e.range.end as usize]));
                kept.push(Bytes::from(file));
            }
            kept
        };
        let moment = format!("exp_avg.{norm}");
        let mut check = |name: &str, tensors: &[(&str, Dtype, &[u64])], expected: &str| {
            let mut files = without(name);
            files.extend(tensors.iter().map(|&tensor| file(&[tensor])));
            match state.load(&files, false) {
                Ok(()) => assert_eq!(expected, "", "{tensors:?}"),
                Err(error) => {
                    assert!(!expected.is_empty() && error.to_string().contains(expected), "{tensors:?}: {error}")
                }
            }
        };
        let slice = |range: &str| format!("{moment}[{range}]");
        let (a, b) = (slice("0:10"), slice("10:32"));
        check(&moment, &[(&b, Dtype::F32, &[22]), (&a, Dtype::F32, &[10])], "");
        check(&moment, &[(&moment, Dtype::F32, &[32])], "");
        check(&moment, &[], "none of the files");
        check(&moment, &[(&a, Dtype::F32, &[10])], "lacks its elements from 10 on");
        check(&moment, &[(&b, Dtype::F32, &[22])], "lacks its elements from 0 on");
        check(&moment, &[(&a, Dtype::F32, &[10]), (&slice("9:32"), Dtype::F32, &[23])], "9:10 twice");
        check(&moment, &[(&a, Dtype::F32, &[10]), (&moment, Dtype::F32, &[32])], "0:10 twice");
        check(&moment, &[(&moment, Dtype::F32, &[32]), (&moment, Dtype::F32, &[32])], "0:32 twice");
        check(&moment, &[(&a, Dtype::F32, &[10]), (&slice("10:33"), Dtype::F32, &[23])], "10:33 beyond");
        check(&moment, &[(&a, Dtype::F32, &[10]), (&slice("10:18446744073709551615"), Dtype::F32, &[22])], "[22] F32");
        check(&moment, &[(&a, Dtype::F32, &[11]), (&b, Dtype::F32, &[22])], "[11] F32");
        check(&moment, &[(&a, Dtype::F32, &[2, 5]), (&b, Dtype::F32, &[22])], "[2, 5] F32");
        check(&moment, &[(&a, Dtype::BF16, &[10]), (&b, Dtype::F32, &[22])], "BF16");
        check(&moment, &[(&slice("010:32"), Dtype::F32, &[22])], "does not have");
        check("", &[("exp_avg.nothing[0:4]", Dtype::F32, &[4])], "does not have");
        // Without fp32 weights beside them, rounded ones would silently lose bits.
        check(&format!("master.{norm}"), &[], "there is no master.");
        check(norm, &[], "none of the files");
        check(norm, &[(&format!("{norm}[0:32]"), Dtype::BF16, &[32])], "BF16");
    }
}
