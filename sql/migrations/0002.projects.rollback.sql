DROP TABLE activity;
DROP TABLE invitations;
DROP TABLE members;
DROP TABLE projects;
