//! Which packages of a lock an interpreter wants.

use std::collections::BTreeMap;
use std::str::FromStr;

use uv_normalize::{ExtraName, GroupName};
use uv_pep440::{Version, VersionSpecifiers};
use uv_pep508::{MarkerEnvironment, MarkerEnvironmentBuilder};

use super::marker::Marker;
use super::{Lock, Package, invalid};
use crate::environment::{Interpreter, Markers};
use crate::error::{Error, Kind, Result};

/// What of a lock the user wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Extras.
    pub extras: Vec<String>,
    /// Dependency groups, besides the lock's default groups.
    pub groups: Vec<String>,
}

impl Lock {
    /// The packages that `python` wants, in the order of the lock.
    ///
    /// # Errors
    /// [`Kind::Invalid`] when the lock is not for this interpreter, has not what `choice` names, has a marker that
    /// cannot be read, or selects two entries of one name.
    pub fn select(&self, python: &Interpreter, choice: &Choice) -> Result<Vec<&Package>> {
        self.check_python(python)?;
        let environment = marker_environment(&python.markers)?;
        let (extras, groups) = self.names(choice)?;
        let holds = |marker: &str, what: &str| -> Result<bool> {
            let marker = Marker::parse(marker).map_err(|why| invalid(format!("{what} is not readable")).detail(why))?;
            Ok(marker.holds(&|comparison| comparison.evaluate_pep751(&environment, &extras, &groups)))
        };
        if !self.environments.is_empty() {
            let mut any = false;
            for marker in &self.environments {
                any |= holds(marker, "\"environments\" of the lock")?;
            }
            if !any {
                return Err(invalid(format!("the lock was not made for CPython {} on this platform", python.version))
                    .detail(self.environments.join("\n"))
                    .hint("choose another interpreter with --python, or write the lock for this one"));
            }
        }
        let mut selected: BTreeMap<&str, &Package> = BTreeMap::new();
        let mut packages = Vec::new();
        for package in &self.packages {
            let what = format!("package {:?} of the lock", package.name);
            if let Some(marker) = &package.marker
                && !holds(marker, &format!("\"marker\" of {what}"))?
            {
                continue;
            }
            if let Some(specifier) = &package.requires_python
                && !python_matches(specifier, python, &what)?
            {
                let version = &python.version;
                return Err(invalid(format!("{what} requires Python {specifier}, and this is {version}"))
                    .hint("choose another interpreter with --python, or write the lock again for this one"));
            }
            if let Some(other) = selected.insert(&package.name, package) {
                let shown = format!("{} and {}", other.label(), package.label());
                return Err(invalid(format!("the lock selects two entries of {:?}: {shown}", package.name))
                    .hint("their markers must exclude each other; write the lock again"));
            }
            packages.push(package);
        }
        Ok(packages)
    }

    /// Fails when the lock as a whole is for other Pythons.
    fn check_python(&self, python: &Interpreter) -> Result<()> {
        match &self.requires_python {
            Some(specifier) if !python_matches(specifier, python, "the lock")? => {
                let message = format!("the lock requires Python {specifier}, and this is {}", python.version);
                Err(invalid(message).hint(format!("choose an interpreter: --python '{specifier}'")))
            }
            _ => Ok(()),
        }
    }

    fn names(&self, choice: &Choice) -> Result<(Vec<ExtraName>, Vec<GroupName>)> {
        let missing = |what: &str, name: &str, there: &[String]| {
            let there = if there.is_empty() { "none".to_string() } else { there.join(", ") };
            Error::new(Kind::Usage, format!("the lock has no {what} {name:?}")).hint(format!("it has: {there}"))
        };
        let mut extras = Vec::new();
        for name in &choice.extras {
            let extra = ExtraName::from_str(name).map_err(|_| missing("extra", name, &self.extras))?;
            if !self.extras.iter().any(|known| ExtraName::from_str(known).is_ok_and(|known| known == extra)) {
                return Err(missing("extra", name, &self.extras));
            }
            extras.push(extra);
        }
        let mut groups = Vec::new();
        for name in &choice.groups {
            let group = GroupName::from_str(name).map_err(|_| missing("group", name, &self.dependency_groups))?;
            let known = self.dependency_groups.iter().chain(&self.default_groups);
            if !known.into_iter().any(|known| GroupName::from_str(known).is_ok_and(|known| known == group)) {
                return Err(missing("group", name, &self.dependency_groups));
            }
            groups.push(group);
        }
        groups.extend(self.default_groups.iter().filter_map(|name| GroupName::from_str(name).ok()));
        Ok((extras, groups))
    }
}

fn python_matches(specifier: &str, python: &Interpreter, what: &str) -> Result<bool> {
    let bad = || invalid(format!("\"requires-python\" of {what} is not readable: {specifier:?}"));
    let specifiers = VersionSpecifiers::from_str(specifier).map_err(|_| bad())?;
    let version = Version::from_str(&python.version).map_err(|_| bad())?;
    Ok(specifiers.contains(&version))
}

/// The markers of an interpreter in uv's form.
///
/// # Errors
/// [`Kind::Invalid`] when a version among them is none.
pub fn marker_environment(markers: &Markers) -> Result<MarkerEnvironment> {
    let builder = MarkerEnvironmentBuilder {
        implementation_name: &markers.implementation_name,
        implementation_version: &markers.implementation_version,
        os_name: &markers.os_name,
        platform_machine: &markers.platform_machine,
        platform_python_implementation: &markers.platform_python_implementation,
        platform_release: &markers.platform_release,
        platform_system: &markers.platform_system,
        platform_version: &markers.platform_version,
        python_full_version: &markers.python_full_version,
        python_version: &markers.python_version,
        sys_platform: &markers.sys_platform,
    };
    MarkerEnvironment::try_from(builder)
        .map_err(|error| invalid("the interpreter says a version that is none").with_source(error))
}
