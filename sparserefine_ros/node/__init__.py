"""The ROS 2 side: parameters, message conversion, the node. The only room that imports rclpy."""
