//! What must be there before machines are started on AWS: their type in the subnets' zones, a way out of each subnet,
//! and the image that they run.

use super::{account::Machines, verdict::Line, within};
use crate::{
    cloud::{
        network::{Network, Subnet, WayOut},
        region,
        registry::{self, ImageName},
    },
    error::Kind,
    report::human,
};

const OFFERED: &str = "offered type";
const WAY_OUT: &str = "way out";
const IMAGE: &str = "image";

/// The lines about the named subnets and the named image.
pub(super) async fn look(wanted: &Machines) -> Vec<Line> {
    let (subnets, image) = tokio::join!(subnets(wanted), image(wanted));
    subnets.into_iter().chain(image).collect()
}

/// The region of the wanted machines.
async fn region_of(wanted: &Machines) -> Option<String> {
    if wanted.region.is_some() {
        return wanted.region.clone();
    }
    region::find().await.map(|(name, _)| name)
}

async fn subnets(wanted: &Machines) -> Vec<Line> {
    if wanted.subnets.is_empty() {
        return Vec::new();
    }
    let Some(region) = region_of(wanted).await else {
        return vec![Line::warn(WAY_OUT, "not known: no region is named", "give --region, or set AWS_REGION")];
    };
    let network = Network::open(&region).await;
    let found = match network.subnets(&wanted.subnets).await {
        Ok(found) => found,
        Err(error) => return vec![Line::error(WAY_OUT, &error)],
    };
    let offered = async {
        let instance_type = wanted.instance_type.as_deref()?;
        let look = async {
            match network.zones(instance_type).await {
                Ok(zones) => offered(instance_type, &region, &found, &zones),
                Err(error) => Line::error(OFFERED, &error),
            }
        };
        Some(within(OFFERED, look).await)
    };
    offered.await.into_iter().chain([way_out(&found)]).collect()
}

/// Whether the subnets' zones have machines of a type at all.
fn offered(instance_type: &str, region: &str, subnets: &[Subnet], zones: &[String]) -> Line {
    let (with, without): (Vec<&Subnet>, Vec<&Subnet>) = subnets.iter().partition(|subnet| zones.contains(&subnet.zone));
    let names = |subnets: &[&Subnet]| {
        let each = subnets.iter().map(|subnet| format!("{} ({})", subnet.id, subnet.zone));
        each.collect::<Vec<_>>().join(", ")
    };
    if zones.is_empty() {
        let found = format!("{region} has no {instance_type}");
        return Line::fail(OFFERED, Kind::Config, found, "choose another type, or another region");
    }
    let others = || format!("use subnets in {}, or another type", zones.join(", "));
    if with.is_empty() {
        let found = format!("{instance_type} is offered in none of these subnets: {}", names(&without));
        return Line::fail(OFFERED, Kind::Config, found, others());
    }
    if without.is_empty() {
        return Line::ok(OFFERED, format!("{instance_type} is offered in {}", names(&with)));
    }
    let found = format!("{instance_type} is offered in {}, but not in {}", names(&with), names(&without));
    Line::warn(OFFERED, found, others())
}

/// Whether machines reach the rest of the world: they fetch their image and reach the store.
fn way_out(subnets: &[Subnet]) -> Line {
    let those = |fits: &dyn Fn(&Subnet) -> bool| {
        let names: Vec<&str> = subnets.iter().filter(|subnet| fits(subnet)).map(|subnet| subnet.id.as_str()).collect();
        Some(names.join(", ")).filter(|names| !names.is_empty())
    };
    if let Some(closed) = those(&|subnet| subnet.way == WayOut::Closed) {
        return Line::fail(
            WAY_OUT,
            Kind::Config,
            format!("no default route leads out of {closed}"),
            "use public subnets (aws ec2 describe-subnets --filters Name=default-for-az,Values=true), or add a route \
             to an internet gateway or a NAT gateway",
        );
    }
    if let Some(bare) = those(&|subnet| subnet.way == WayOut::Gateway && !subnet.gives_addresses) {
        return Line::warn(
            WAY_OUT,
            format!("{bare}: an internet gateway, but machines get no public address by themselves"),
            "the launch template must ask for one (AssociatePublicIpAddress), as the stack in userdata/ does",
        );
    }
    let way = |subnet: &Subnet| match &subnet.way {
        WayOut::Through(target) => format!("{} through {target}", subnet.id),
        WayOut::Gateway | WayOut::Closed => format!("{} through an internet gateway", subnet.id),
    };
    Line::ok(WAY_OUT, subnets.iter().map(way).collect::<Vec<_>>().join(", "))
}

async fn image(wanted: &Machines) -> Option<Line> {
    let text = wanted.image.as_deref()?;
    let Some(name) = ImageName::read(text) else {
        return Some(Line::skipped(IMAGE, format!("{text} is not in Amazon's registry: nothing is known of it here")));
    };
    let look = async {
        let region = region_of(wanted).await;
        match registry::size(&name).await {
            Ok(bytes) => shown(&name, bytes, region.as_deref()),
            Err(error) => Line::error(IMAGE, &error),
        }
    };
    Some(within(IMAGE, look).await)
}

/// An image that is there.
fn shown(name: &ImageName, bytes: Option<u64>, region: Option<&str>) -> Line {
    let size = bytes.map_or_else(|| "there".to_owned(), |bytes| format!("there, {} to fetch", human::bytes(bytes)));
    if let Some(region) = region.filter(|region| *region != name.region()) {
        let found = format!("{size}, but in {}, while the machines are in {region}", name.region());
        let todo = format!("push it to {region}: every start of a machine fetches it from there");
        return Line::warn(IMAGE, found, todo);
    }
    if name.may_change() {
        let found = format!("{size}; its tag may be given to another image");
        return Line::warn(IMAGE, found, "name it by its digest (…@sha256:…), as scripts/publish-image prints it");
    }
    Line::ok(IMAGE, size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::verdict::Verdict;

    fn subnet(id: &str, zone: &str, way: WayOut) -> Subnet {
        Subnet { id: id.into(), zone: zone.into(), gives_addresses: true, way }
    }

    #[test]
    fn a_type_must_be_offered_where_the_subnets_are() {
        let two = [subnet("subnet-1", "a", WayOut::Gateway), subnet("subnet-2", "b", WayOut::Gateway)];
        let verdict = |zones: &[&str]| {
            let zones: Vec<String> = zones.iter().map(|zone| (*zone).to_owned()).collect();
            offered("g5.xlarge", "us-east-1", &two, &zones)
        };
        assert_eq!(verdict(&["a", "b", "c"]).verdict, Verdict::Ok);
        let some = verdict(&["b", "c"]);
        assert_eq!(some.verdict, Verdict::Warn);
        assert!(some.found.ends_with("but not in subnet-1 (a)") && some.todo.unwrap().contains("b, c"));
        assert_eq!(verdict(&["c"]).verdict, Verdict::Fail);
        assert_eq!(verdict(&[]).found, "us-east-1 has no g5.xlarge");
    }

    #[test]
    fn every_subnet_needs_a_way_out() {
        let open = subnet("subnet-1", "a", WayOut::Gateway);
        let nat = subnet("subnet-2", "b", WayOut::Through("nat-1".into()));
        let ok = way_out(&[open.clone(), nat.clone()]);
        assert_eq!(ok.verdict, Verdict::Ok);
        assert_eq!(ok.found, "subnet-1 through an internet gateway, subnet-2 through nat-1");
        let bare = Subnet { gives_addresses: false, ..open.clone() };
        assert_eq!(way_out(&[bare, nat.clone()]).verdict, Verdict::Warn);
        assert_eq!(way_out(&[Subnet { gives_addresses: false, ..nat }]).verdict, Verdict::Ok, "NAT has an address");
        let closed = way_out(&[open, subnet("subnet-3", "a", WayOut::Closed)]);
        assert_eq!((closed.verdict, closed.found.as_str()), (Verdict::Fail, "no default route leads out of subnet-3"));
    }

    #[test]
    fn an_image_is_best_near_and_named_by_its_digest() {
        let name = |rest: &str| ImageName::read(&format!("1.dkr.ecr.eu-west-1.amazonaws.com/{rest}")).unwrap();
        let digest = name("trainer@sha256:00");
        let ok = shown(&digest, Some(3 << 30), Some("eu-west-1"));
        assert_eq!((ok.verdict, ok.found.as_str()), (Verdict::Ok, "there, 3.00 GiB to fetch"));
        assert_eq!(shown(&digest, None, None).verdict, Verdict::Ok);
        assert_eq!(shown(&name("trainer:1"), None, None).verdict, Verdict::Warn);
        assert!(shown(&digest, None, Some("us-east-1")).found.contains("while the machines are in us-east-1"));
    }
}
