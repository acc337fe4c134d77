//! The GPUs of EC2's instance types: their number by size (EC2 instance types guide, "Accelerated computing"), and the
//! memory that their driver shows, which is less than the number in their name.

/// The GPUs of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuSet {
    /// Their name.
    pub name: &'static str,
    /// How many there are.
    pub count: u32,
    /// Bytes of each.
    pub bytes: u64,
}

/// A class of instance types: its name, that of its GPUs, MiB of each, and the sizes that have more than one.
type Class = (&'static str, &'static str, u64, &'static [(&'static str, u32)]);

/// Every class that is known.
const CLASSES: [Class; 13] = [
    ("g4dn", "T4", 15_109, &[("12xlarge", 4), ("metal", 8)]),
    ("g5", "A10G", 23_028, &[("12xlarge", 4), ("24xlarge", 4), ("48xlarge", 8)]),
    ("g6", "L4", 23_034, &[("12xlarge", 4), ("24xlarge", 4), ("48xlarge", 8)]),
    ("gr6", "L4", 23_034, &[]),
    ("g6e", "L40S", 46_068, &[("12xlarge", 4), ("24xlarge", 4), ("48xlarge", 8)]),
    ("p3", "V100", 16_160, &[("8xlarge", 4), ("16xlarge", 8)]),
    ("p3dn", "V100", 32_510, &[("24xlarge", 8)]),
    ("p4d", "A100", 40_536, &[("24xlarge", 8)]),
    ("p4de", "A100", 81_251, &[("24xlarge", 8)]),
    ("p5", "H100", 81_559, &[("48xlarge", 8)]),
    ("p5e", "H200", 143_771, &[("48xlarge", 8)]),
    ("p5en", "H200", 143_771, &[("48xlarge", 8)]),
    ("p6-b200", "B200", 183_359, &[("48xlarge", 8)]),
];

/// The GPUs of an instance type such as `g5.12xlarge`; `None`: it has none, or is not known here.
pub fn gpus(instance_type: &str) -> Option<GpuSet> {
    let (class, size) = instance_type.split_once('.')?;
    let (_, name, mib, several) = CLASSES.iter().find(|(known, ..)| *known == class)?;
    let count = several.iter().find(|(known, _)| *known == size).map_or(1, |(_, count)| *count);
    Some(GpuSet { name, count, bytes: mib << 20 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_names_its_gpus() {
        let of = |instance_type| gpus(instance_type).map(|GpuSet { name, count, bytes }| (name, count, bytes >> 30));
        assert_eq!(of("g5.xlarge"), Some(("A10G", 1, 22)));
        assert_eq!(of("g6.12xlarge"), Some(("L4", 4, 22)));
        assert_eq!(of("p5.48xlarge"), Some(("H100", 8, 79)));
        assert_eq!(of("p5e.48xlarge"), Some(("H200", 8, 140)));
        assert_eq!(of("p6-b200.48xlarge"), Some(("B200", 8, 179)));
        for none in ["m5.large", "g5", "g7.xlarge", ""] {
            assert_eq!(of(none), None, "{none}");
        }
    }
}
