"""The parameter table as ROS parameters of a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter

from sparserefine_ros.errors import ParameterError, SparseRefineError
from sparserefine_ros.node.parameters import BY_NAME, PARAMETERS, Parameter, Value


def descriptor(parameter: Parameter) -> ParameterDescriptor:
    """What `ros2 param describe` shows: text, range, choices, and whether it may change."""
    result = ParameterDescriptor(
        name=parameter.name,
        description=parameter.description,
        additional_constraints=parameter.values,
        dynamic_typing=parameter.several_types,
    )
    if parameter.minimum is not None and parameter.maximum is not None:
        low, high = parameter.minimum, parameter.maximum
        if isinstance(parameter.default, int):
            result.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
        else:
            result.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    return result


def declare(node: Node) -> dict[str, Value]:
    """Declares every parameter of the table once; the values, overrides included, checked as `current` does.

    Raises ParameterError naming the parameter, the value and what is allowed.
    """
    for parameter in PARAMETERS:
        try:
            node.declare_parameter(parameter.name, parameter.default, descriptor(parameter))
        except ParameterException as error:
            raise ParameterError(f"{error}; '{parameter.name}' must be: {parameter.values}") from error
    given = {name for name in overrides(node) if name != "use_sim_time" and "." not in name}  # dots: ROS's own
    unknown = sorted(given - set(BY_NAME))
    if unknown:
        node.get_logger().warning(f"unknown parameters ignored: {', '.join(unknown)}; known: {', '.join(BY_NAME)}")
    return current(node)


def current(node: Node) -> dict[str, Value]:
    """The values as they are now, each in its parameter's type; ParameterError as `Parameter.check`."""
    return {p.name: p.check(node.get_parameter(p.name).value) for p in PARAMETERS}


def overrides(node: Node) -> Mapping[str, Any]:
    """What the command line or a parameter file gives, by full name."""
    given: Mapping[str, Any] = getattr(node, "_parameter_overrides", {})  # no public way in any distribution
    return given


def on_change(node: Node, apply: Callable[[Mapping[str, Value]], None]) -> None:
    """Checks live changes and hands those made together to `apply`; what either refuses is refused with its reason."""

    def changed(parameters: Sequence[Any]) -> SetParametersResult:
        try:
            for p in parameters:
                if p.name in BY_NAME and p.type_ == RosParameter.Type.NOT_SET:  # `[]`, too, has a type here
                    raise ParameterError(f"parameter '{p.name}' cannot be deleted; set it to its default instead")
            apply({p.name: BY_NAME[p.name].check(p.value) for p in parameters if p.name in BY_NAME})
        except SparseRefineError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    node.add_on_set_parameters_callback(changed)
